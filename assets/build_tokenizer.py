"""Builds the tokenizer of the embedded checkpoint from the training part of Tiny Shakespeare.

    python -m ebt_transformers.assets.build_tokenizer

writes ``tokenizer.json`` and ``tokenizer_config.json`` into ``assets/tiny_ebt`` (``--output`` for another folder). The
result depends on the text and the vocabulary size alone: a second run writes the same bytes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from . import checkpoint_path, shakespeare_splits


__all__ = ["END_OF_TEXT", "PAD", "build_tokenizer", "main"]

END_OF_TEXT = "<|endoftext|>"  # id 0: begins and ends a text
PAD = "<|pad|>"  # id 1


def build_tokenizer(text: str, vocab_size: int = 1024, model_max_length: int = 256) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `text`.

    Args:
        text: What the merges are learned from. Any other text can be encoded too: all 256 bytes are in the vocabulary.
        vocab_size: Number of tokens, special tokens and bytes included.
        model_max_length: The context length the tokenizer warns about and truncates to.

    Returns:
        A tokenizer that adds no special tokens of its own and whose decoded text equals the encoded one.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(text.splitlines(keepends=True), trainer, length=text.count("\n"))
    if bpe.get_vocab_size() != vocab_size:
        raise ValueError(f"The text yields {bpe.get_vocab_size()} tokens, not the vocab_size={vocab_size} asked for.")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Build the tokenizer, prove that the whole text survives a round trip, and save it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=checkpoint_path(), help="folder to write to")
    parser.add_argument("--vocab-size", type=int, default=1024, help="number of tokens in all (default: 1024)")
    parser.add_argument("--model-max-length", type=int, default=256, help="context length (default: 256)")
    arguments = parser.parse_args(argv)

    splits = shakespeare_splits()
    tokenizer = build_tokenizer(splits["train"], arguments.vocab_size, arguments.model_max_length)
    for name, text in splits.items():
        ids = tokenizer(text, verbose=False)["input_ids"]
        if tokenizer.decode(ids) != text:
            raise ValueError(f"The {name} part of the text does not survive encoding and decoding.")
        print(f"{name}: {len(text)} characters, {len(ids)} tokens, {len(text) / len(ids):.3f} characters per token")
    tokenizer.save_pretrained(arguments.output)
    print(f"saved to {arguments.output}")


if __name__ == "__main__":
    main()
