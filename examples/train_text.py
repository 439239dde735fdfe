"""Train a small EBT on text in Python; `ebt train clm` does the same and more from the shell.

python examples/train_text.py --max_steps 300
"""

import argparse
from collections.abc import Sequence

from transformers import AutoTokenizer, set_seed

from ebt_transformers import EBTConfig, EBTForCausalLM, EBTTrainer, EBTTrainingArguments, perplexity_by_steps
from ebt_transformers.assets import checkpoint_path, shakespeare_splits
from ebt_transformers.training.data import CausalLMCollator, PackedBlocks, tokenize


BLOCK_SIZE = 64


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/example_text")
    parser.add_argument("--max_steps", type=int, default=300)
    options = parser.parse_args(argv)
    set_seed(33)

    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    splits = shakespeare_splits()
    blocks = {
        name: PackedBlocks(tokenize([splits[name]], tokenizer), BLOCK_SIZE, pad_token_id=tokenizer.pad_token_id)
        for name in ("train", "validation")
    }
    config = EBTConfig.from_preset(
        "4xs",
        vocab_size=len(tokenizer),
        max_position_embeddings=BLOCK_SIZE,
        candidate_anchor="token",  # not in the paper: learns far faster at this size
        step_size=5.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer = EBTTrainer(
        EBTForCausalLM(config),
        EBTTrainingArguments(
            options.output_dir,
            max_steps=options.max_steps,
            learning_rate=4e-3,
            per_device_train_batch_size=8,
            report_to="none",
        ),
        train_dataset=blocks["train"],
        eval_dataset=[blocks["validation"][index] for index in range(32)],
        processing_class=tokenizer,
        data_collator=CausalLMCollator(tokenizer.pad_token_id),
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()  # model, tokenizer and model card
    held_out = [blocks["validation"][index] for index in range(32)]
    print("Held-out perplexity by thinking steps:", perplexity_by_steps(trainer.model, held_out, progress_bar=False))


if __name__ == "__main__":
    main()
