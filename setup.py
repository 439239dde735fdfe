"""Maps the repository root onto the import package ``ebt_transformers``; everything else is in pyproject.toml."""

from setuptools import setup
from setuptools.command.build_py import build_py as _build_py


PACKAGE = "ebt_transformers"
SUBPACKAGES = (
    "assets",
    "configuration",
    "metrics",
    "metrics.ebt_energy_auroc",
    "metrics.ebt_energy_gap",
    "metrics.ebt_perplexity",
    "metrics.psnr",
    "metrics.ssim",
    "modeling_ebt",
    "modeling_et",
    "pipelines",
    "training",
    "web",
)
ROOT_MODULES = ("__init__", "cli", "cli_options", "demo", "demo_image", "registration", "reporting")
# no code inside; setuptools wants them named all the same
DATA_FOLDERS = ("assets.tiny_ebt", "assets.tiny_ebt_image", "assets.tiny_et")
PACKAGE_DATA = {
    PACKAGE: ["py.typed"],
    f"{PACKAGE}.assets": ["*.png", "*.txt"],
    f"{PACKAGE}.assets.tiny_ebt": ["*"],
    f"{PACKAGE}.assets.tiny_ebt_image": ["*"],
    f"{PACKAGE}.assets.tiny_et": ["*"],
}


class build_py(_build_py):
    """Of the modules at the root take only those that belong to the package (not setup.py and the like)."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if package != PACKAGE or module[1] in ROOT_MODULES]


if __name__ == "__main__":
    setup(
        packages=[PACKAGE, *(f"{PACKAGE}.{name}" for name in (*SUBPACKAGES, *DATA_FOLDERS))],
        package_dir={PACKAGE: "."},
        package_data=PACKAGE_DATA,
        cmdclass={"build_py": build_py},
    )
