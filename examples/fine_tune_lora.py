"""Teach the shipped model a new manner with LoRA; `ebt train clm --peft lora` does the same from the shell.

python examples/fine_tune_lora.py --max_steps 100
"""

import argparse
from collections.abc import Sequence

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from ebt_transformers import EBTTrainer, EBTTrainingArguments
from ebt_transformers.assets import checkpoint_path
from ebt_transformers.training.data import CausalLMCollator, PackedBlocks, tokenize


TEXT = "JULIET:\nO gentle sir, the energy is low, and I shall think a little longer.\n\n" * 60
BLOCK_SIZE = 64
PROMPT = "JULIET:\nO gentle"


def continuation(model: PeftModel, tokenizer: AutoTokenizer) -> str:
    """What the model makes of the prompt, greedily."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, thinking_steps=4, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/example_lora")
    parser.add_argument("--max_steps", type=int, default=100)
    options = parser.parse_args(argv)
    set_seed(33)

    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint_path()), lora)
    model.print_trainable_parameters()
    trainer = EBTTrainer(
        model,
        EBTTrainingArguments(
            options.output_dir,
            max_steps=options.max_steps,
            learning_rate=5e-3,
            per_device_train_batch_size=4,
            report_to="none",
        ),
        train_dataset=PackedBlocks(tokenize([TEXT], tokenizer), BLOCK_SIZE, pad_token_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
        data_collator=CausalLMCollator(tokenizer.pad_token_id),
    )
    print("before:", continuation(model.eval(), tokenizer))
    trainer.train()
    trainer.save_model()  # the adapter alone

    base = AutoModelForCausalLM.from_pretrained(checkpoint_path())
    merged = PeftModel.from_pretrained(base, options.output_dir).merge_and_unload().eval()
    print("after: ", continuation(merged, tokenizer))


if __name__ == "__main__":
    main()
