"""The `datasets` library, imported when it is needed, with errors that say what to do."""

from typing import Any


def datasets_library(packages: str = "datasets") -> Any:
    """
    The `datasets` library.

    Args:
        packages (`str`, *optional*): what pip has to install for this kind of data.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"Reading this data needs the `datasets` library: pip install {packages}.") from error
    return datasets


def load_dataset(path: str, *args: Any, **options: Any) -> Any:
    """
    `datasets.load_dataset`, whose errors name the data and the cause.

    Args:
        path (`str`): a dataset id on the Hub, a folder, or the name of a loader.
        *args, **options: as for `datasets.load_dataset`.

    Raises:
        FileNotFoundError: for data that do not exist.
        ValueError: for data that cannot be reached or read.
    """
    library = datasets_library()
    try:
        return library.load_dataset(path, *args, **options)
    except ConnectionError as error:
        raise ValueError(f"The data cannot be reached: {error} Check the name and the connection.") from error
    except library.exceptions.DatasetGenerationError as error:
        # its own message says nothing but that there was an error
        name = ", ".join(file for files in options.get("data_files", {}).values() for file in files) or path
        raise ValueError(f"{name} cannot be read: {error.__cause__ or error} Check the files.") from error


__all__ = ["datasets_library", "load_dataset"]
