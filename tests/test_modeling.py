"""Laws of the two-stream model: padding, batches, caches, precisions, saving and loading change nothing."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, StaticCache

from ebt_transformers import EBTConfig, EBTForCausalLM, EBTModel


MakeModel = Callable[..., EBTForCausalLM]
# rounding errors grow with every step on a random, steep landscape; a leak shows as 0.1 and more
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
MAX_LENGTH = 32


def tokens(*shape: int, seed: int = 0, vocab: int = 41) -> Tensor:
    """Random token ids."""
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as one batch with its attention mask; padding holds arbitrary tokens."""
    width = max(len(row) for row in rows)
    ids, mask = tokens(len(rows), width, seed=99), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients of all parameters that have one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_once(model: EBTForCausalLM, ids: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one training step from a fixed random state."""
    model.train().zero_grad()
    torch.manual_seed(3)
    loss = model(input_ids=ids, labels=kwargs.pop("labels", ids), **kwargs).loss
    loss.backward()
    return loss.detach(), gradients(model)


# ------------------------------------------------------------------------------------------------- padding and batches


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_rows_alone(any_model: EBTForCausalLM, side: str, candidates: int) -> None:
    rows = [tokens(length, seed=length) for length in (4, 7, 6)]
    ids, mask = padded(rows, side)
    options = {"thinking_candidates": candidates, "output_energies": True}
    with torch.no_grad():
        batch = any_model(input_ids=ids, attention_mask=mask, **options)
        for index, row in enumerate(rows):
            alone = any_model(input_ids=row[None], **options)
            real = mask[index].bool()
            assert_close(batch.logits[index, real], alone.logits[0], **CLOSE)
            assert_close(batch.energies[index, real], alone.energies[0], **CLOSE)
            assert torch.equal(batch.steps_taken[index, real], alone.steps_taken[0])


def test_tokens_under_the_padding_change_nothing(any_model: EBTForCausalLM) -> None:
    ids, mask = padded([tokens(4), tokens(7)], "left")
    other = torch.where(mask.bool(), ids, (ids + 1) % 41)
    with torch.no_grad():
        assert_close(
            any_model(input_ids=ids, attention_mask=mask).logits[mask.bool()],
            any_model(input_ids=other, attention_mask=mask).logits[mask.bool()],
            rtol=0,
            atol=0,
        )


def test_no_position_sees_the_future(any_model: EBTForCausalLM) -> None:
    ids = tokens(1, 8)
    changed = ids.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 41
    with torch.no_grad():
        first, second = any_model(input_ids=ids).logits, any_model(input_ids=changed).logits
    assert_close(first[:, :5], second[:, :5], **CLOSE)
    assert not torch.allclose(first[:, 5:], second[:, 5:], atol=0.01)


def test_a_mask_of_ones_is_no_mask(any_model: EBTForCausalLM) -> None:
    ids = tokens(2, 6)
    with torch.no_grad():
        expected = any_model(input_ids=ids).logits
        assert_close(any_model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, expected, **CLOSE)
        assert_close(any_model(input_ids=ids, position_ids=torch.arange(6)[None]).logits, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_4d_mask_equals_the_2d_mask_it_spells_out(any_model: EBTForCausalLM, kind: str) -> None:
    ids, mask = padded([tokens(4), tokens(7)], "left")
    visible = torch.ones(7, 7, dtype=torch.bool).tril()[None, None] & mask[:, None, None].bool()
    spelled = visible if kind == "bool" else torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = any_model(input_ids=ids, attention_mask=mask).logits
        got = any_model(input_ids=ids, attention_mask=spelled, position_ids=positions).logits
    assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)


def test_inputs_embeds_equal_the_tokens_they_embed(any_model: EBTForCausalLM) -> None:
    ids = tokens(2, 5)
    with torch.no_grad():
        embeds = any_model.get_input_embeddings()(ids)
        assert_close(any_model(inputs_embeds=embeds).logits, any_model(input_ids=ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4]), torch.tensor([5])])
def test_logits_to_keep_is_a_slice_of_all_logits(any_model: EBTForCausalLM, keep: int | Tensor) -> None:
    ids = tokens(2, 6)
    options = {"thinking_candidates": 2, "output_energies": True}
    with torch.no_grad():
        everything = any_model(input_ids=ids, **options)
        kept = any_model(input_ids=ids, logits_to_keep=keep, **options)
    where = slice(-keep, None) if isinstance(keep, int) else keep
    assert_close(kept.logits, everything.logits[:, where], **CLOSE)
    assert_close(kept.energies, everything.energies[:, where], **CLOSE)


# --------------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prefill_in_chunks_and_decoding_with_cache_equal_each_row_alone_without(
    any_model: EBTForCausalLM, cache: str, candidates: int
) -> None:
    rows = [tokens(length, seed=length) for length in (6, 9)]
    ids, mask = padded(rows, "left")
    options = {"thinking_candidates": candidates, "output_energies": True}
    past = None if cache == "dynamic" else StaticCache(config=any_model.config, max_cache_len=12)
    logits, energies = [], []
    with torch.no_grad():
        for start, stop in ((0, 4), (4, 6), (6, 7), (7, 8), (8, 9)):
            output = any_model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                past_key_values=past,
                use_cache=True,
                **options,
            )
            past = output.past_key_values
            logits.append(output.logits)
            energies.append(output.energies)
        for index, row in enumerate(rows):
            alone = any_model(input_ids=row[None], use_cache=False, **options)
            real = mask[index].bool()
            assert alone.past_key_values is None
            assert_close(torch.cat(logits, 1)[index, real], alone.logits[0], **CLOSE)
            assert_close(torch.cat(energies, 1)[index, real], alone.energies[0], **CLOSE)
    assert past.get_seq_length() == 9


def test_the_cache_holds_context_tokens_only(any_model: EBTForCausalLM) -> None:
    with torch.no_grad():
        cache = any_model(input_ids=tokens(2, 5), thinking_candidates=3, thinking_steps=4).past_key_values
    heads = any_model.config.num_key_value_heads * any_model.config.num_landscapes
    assert cache.layers[0].keys.shape == (2, heads, 5, any_model.config.head_dim)


def test_more_steps_than_landscapes_use_the_same_cache(any_model: EBTForCausalLM) -> None:
    ids = tokens(1, 6)
    with torch.no_grad():
        past = any_model(input_ids=ids[:, :5], thinking_steps=2).past_key_values
        got = any_model(input_ids=ids[:, 5:], past_key_values=past, thinking_steps=5).logits
        assert_close(got, any_model(input_ids=ids, thinking_steps=5).logits[:, 5:], **CLOSE)


def test_a_cache_of_more_landscapes_serves_fewer_steps(make_model: MakeModel) -> None:
    model, ids = make_model(), tokens(1, 6)
    with torch.no_grad():
        past = model(input_ids=ids[:, :5], thinking_steps=2).past_key_values
        got = model(input_ids=ids[:, 5:], past_key_values=past, thinking_steps=1).logits
        assert_close(got, model(input_ids=ids, thinking_steps=1).logits[:, 5:], **CLOSE)


def test_a_cache_of_too_few_landscapes_raises_naming_both(make_model: MakeModel) -> None:
    model = make_model(num_landscapes=3)
    with torch.no_grad():
        past = model(input_ids=tokens(1, 4), thinking_steps=1).past_key_values
        with pytest.raises(ValueError, match=r"1 landscape.* needs 3"):
            model(input_ids=tokens(1, 1), past_key_values=past, thinking_steps=3)


# ---------------------------------------------------------------------------------------------- precision and backends


def test_eager_attention_equals_sdpa(any_model: EBTForCausalLM) -> None:
    ids, mask = padded([tokens(4), tokens(7)], "left")
    eager = copy.deepcopy(any_model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        assert_close(
            eager(input_ids=ids, attention_mask=mask).logits[mask.bool()],
            any_model(input_ids=ids, attention_mask=mask).logits[mask.bool()],
            **CLOSE,
        )
    loss, expected = train_once(any_model, ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    eager_loss, got = train_once(eager, ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    assert_close(eager_loss, loss, **CLOSE)
    assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_inference_mode_and_no_grad_and_grad_agree(any_model: EBTForCausalLM) -> None:
    ids = tokens(2, 5)
    free = any_model(input_ids=ids, output_energies=True)
    with torch.no_grad():
        quiet = any_model(input_ids=ids, output_energies=True)
    with torch.inference_mode():
        born_inside = ids + 0
        inference = any_model(input_ids=born_inside, output_energies=True)
        cached = any_model(input_ids=born_inside[:, :1], past_key_values=inference.past_key_values)
    for other in (quiet, inference):
        assert_close(other.logits, free.logits, rtol=0, atol=0)
        assert_close(other.energies, free.energies, rtol=0, atol=0)
    assert not quiet.logits.requires_grad
    assert cached.past_key_values.get_seq_length() == 6


def test_evaluation_in_grad_mode_keeps_no_graph_of_the_steps(any_model: EBTForCausalLM) -> None:
    output = any_model(input_ids=tokens(1, 4), output_energies=True)
    assert not output.energies.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_the_state_and_energies_in_float32(
    any_model: EBTForCausalLM, dtype: torch.dtype
) -> None:
    ids = tokens(2, 5)
    with torch.no_grad():
        expected = any_model(input_ids=ids, output_energies=True)
        output = any_model.to(dtype)(input_ids=ids, output_energies=True)
    assert output.logits.dtype == output.energies.dtype == torch.float32
    assert output.past_key_values.layers[0].keys.dtype == dtype
    assert torch.isfinite(output.logits).all()
    assert_close(output.energies[..., 0], expected.energies[..., 0], rtol=0.2, atol=0.3)


def test_bfloat16_autocast_keeps_the_state_and_energies_in_float32(any_model: EBTForCausalLM) -> None:
    ids = tokens(2, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            output = any_model(input_ids=ids, output_energies=True)
        assert output.logits.dtype == output.energies.dtype == torch.float32
        loss, grads = train_once(any_model, ids)
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(grad).all() and grad.dtype == torch.float32 for grad in grads.values())


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its new name is newer than 5.10
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("recipe", ["s1", "s2"])
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(
    any_model: EBTForCausalLM, recipe: str, reentrant: bool | None
) -> None:
    if recipe == "s2":
        any_model.config.loss_on_steps, any_model.config.detach_between_steps = "last", False
    ids, mask = padded([tokens(4), tokens(7)], "right")
    loss, expected = train_once(any_model, ids, attention_mask=mask)
    any_model.gradient_checkpointing_enable(None if reentrant is None else {"use_reentrant": reentrant})
    again, got = train_once(any_model, ids, attention_mask=mask)
    assert_close(again, loss, rtol=1e-6, atol=1e-6)
    assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_on_steps", ["all", "last"])
def test_every_trainable_parameter_gets_a_gradient_in_one_step(any_model: EBTForCausalLM, loss_on_steps: str) -> None:
    any_model.config.loss_on_steps = loss_on_steps
    any_model.config.detach_between_steps = loss_on_steps == "all"
    _, grads = train_once(any_model, tokens(2, 6))
    trainable = {name for name, parameter in any_model.named_parameters() if parameter.requires_grad}
    assert set(grads) == trainable
    assert [name for name, grad in grads.items() if not grad.abs().sum() > 0] == []


def test_adaln_zero_starts_flat_so_that_only_the_energy_head_can_move_first() -> None:
    torch.manual_seed(0)
    config = EBTConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, step_conditioning="adaln_zero"
    )
    model = EBTForCausalLM(config)
    _, grads = train_once(model, tokens(2, 6))
    assert [name for name, grad in grads.items() if grad.abs().sum() > 0] == ["model.energy_head.weight"]


def test_a_fixed_step_size_gets_no_gradient(make_model: MakeModel) -> None:
    model = make_model(learn_step_size=False)
    _, grads = train_once(model, tokens(2, 6))
    assert "step_size.value" not in grads


def test_num_items_in_batch_divides_the_sum_of_token_losses(any_model: EBTForCausalLM) -> None:
    ids = tokens(2, 6)
    mean, expected = train_once(any_model, ids)
    loss, got = train_once(any_model, ids, num_items_in_batch=torch.tensor(40))
    share = ids[:, 1:].numel() / 40
    assert_close(loss, mean * share, **CLOSE)
    assert_close(got, {name: grad * share for name, grad in expected.items()}, rtol=1e-3, atol=1e-5)


def test_one_batch_equals_its_rows_accumulated(any_model: EBTForCausalLM) -> None:
    any_model.config.candidate_init = "zeros"
    ids = tokens(3, 6)
    count = torch.tensor(ids[:, 1:].numel())
    whole, expected = train_once(any_model, ids, num_items_in_batch=count)
    any_model.zero_grad()
    total = torch.zeros(())
    for row in ids:
        loss = any_model(input_ids=row[None], labels=row[None], num_items_in_batch=count).loss
        loss.backward()
        total += loss.detach()
    assert_close(total, whole, **CLOSE)
    assert_close(gradients(any_model), expected, rtol=1e-3, atol=1e-5)


def test_the_evaluation_loss_is_the_cross_entropy_of_the_final_logits(any_model: EBTForCausalLM) -> None:
    ids = tokens(2, 6)
    labels = ids.clone()
    labels[0, :3] = -100
    for candidates in (1, 2):
        with torch.no_grad():
            output = any_model(input_ids=ids, labels=labels, thinking_candidates=candidates)
        flat = output.logits[:, :-1].flatten(0, 1)
        assert_close(output.loss, torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten()))


def test_shift_labels_are_labels_already_shifted(any_model: EBTForCausalLM) -> None:
    ids = tokens(2, 6)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        expected = any_model(input_ids=ids, labels=ids).loss
        assert_close(any_model(input_ids=ids, shift_labels=shifted).loss, expected)


def test_step_losses_are_the_losses_of_thinking_that_many_steps(any_model: EBTForCausalLM) -> None:
    ids = tokens(2, 6)
    with torch.no_grad():
        output = any_model(input_ids=ids, labels=ids, thinking_steps=4)
        assert output.step_losses.shape == (4,)
        for steps in (1, 2, 3, 4):
            assert_close(
                output.step_losses[steps - 1], any_model(input_ids=ids, labels=ids, thinking_steps=steps).loss
            )


@pytest.mark.parametrize("loss_on_steps", ["all", "last"])
def test_the_training_loss_is_the_recipe_over_the_step_losses(make_model: MakeModel, loss_on_steps: str) -> None:
    model, ids = make_model(loss_on_steps=loss_on_steps).train(), tokens(2, 6)
    output = model(input_ids=ids, labels=ids)
    expected = output.step_losses.mean() if loss_on_steps == "all" else output.step_losses[-1]
    assert_close(output.loss.detach(), expected)
    assert output.mean_energies.shape == (2,)


def test_mean_energies_cover_labelled_positions_only(make_model: MakeModel) -> None:
    model, ids = make_model(candidate_init="zeros").train(), tokens(1, 6)
    labels = ids.clone()
    labels[0, 1:4] = -100
    energies = model(input_ids=ids, labels=labels, output_energies=True)
    expected = energies.energies[0, [3, 4], :2].mean(0)
    assert_close(energies.mean_energies, expected.detach())


def test_training_without_labels_returns_logits_and_no_loss(make_model: MakeModel) -> None:
    output = make_model().train()(input_ids=tokens(2, 6))
    assert output.loss is None
    assert output.logits.requires_grad


# ----------------------------------------------------------------------------------------------------- outputs and API


def test_a_tuple_holds_what_the_output_object_holds(make_model: MakeModel) -> None:
    model, ids = make_model(), tokens(1, 4)
    with torch.no_grad():
        named = model(input_ids=ids, labels=ids)
        plain = model(input_ids=ids, labels=ids, return_dict=False)
    assert isinstance(plain, tuple)
    assert_close(plain[0], named.loss)
    assert_close(plain[1], named.logits)


def test_hidden_states_and_attentions_are_those_of_the_context(any_model: EBTForCausalLM) -> None:
    any_model.set_attn_implementation("eager")
    with torch.no_grad():
        output = any_model(input_ids=tokens(2, 5), output_hidden_states=True, output_attentions=True)
        plain = any_model(input_ids=tokens(2, 5))
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 5, 16)] * 3
    columns = 5 + any_model.model.has_step_token
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 5, columns)] * 2
    assert_close(output.logits, plain.logits, rtol=0, atol=0)
    assert plain.hidden_states is None and plain.attentions is None


def test_energies_are_absent_unless_asked_for(make_model: MakeModel) -> None:
    with torch.no_grad():
        assert make_model()(input_ids=tokens(1, 4)).energies is None


def test_the_trajectory_is_that_of_fewer_steps_and_has_the_reported_energies(any_model: EBTForCausalLM) -> None:
    ids = tokens(2, 5)
    with torch.no_grad():
        output = any_model(ids, output_energies=True, output_trajectory=True, thinking_steps=4)
        for steps in range(1, 5):
            assert_close(output.trajectory[:, :, steps], any_model(ids, thinking_steps=steps).logits, **CLOSE)
        last = any_model.config.num_landscapes - 1
        for index in range(5):
            probs = output.trajectory[:, :, index].softmax(-1)
            expected = any_model.energy(ids, candidate_probs=probs, landscape=min(index, last))
            assert_close(output.energies[..., index], expected, **CLOSE)
        assert any_model(ids).trajectory is None
    assert torch.equal(output.trajectory[:, :, -1], output.logits)
    assert output.trajectory[:, :, 0].any() == any_model.config.starts_at_prediction


def test_the_trajectory_is_that_of_the_chosen_candidate(any_model: EBTForCausalLM) -> None:
    ids, options = tokens(2, 5), {"thinking_candidates": 3, "thinking_steps": 3, "thinking_init": "normal"}
    with torch.no_grad():
        output = any_model(ids, output_trajectory=True, **options)
        alone = any_model(ids, initial_candidate=output.trajectory[:, :, 0], output_trajectory=True, thinking_steps=3)
    assert_close(output.trajectory, alone.trajectory, **CLOSE)
    assert torch.equal(output.trajectory[:, :, -1], output.logits)


def test_the_base_model_gives_hidden_states_and_scores_candidates(any_model: EBTForCausalLM) -> None:
    base, ids = any_model.model, tokens(2, 5)
    with torch.no_grad():
        output = base(ids)
        embeds = any_model.candidate_embedding.weight[ids]
        scored = base(candidate_embeds=embeds, context=output.context, landscape=0).energies
        assert output.last_hidden_state.shape == (2, 5, 16)
        assert_close(scored, any_model.energy(ids, candidate_ids=ids, landscape=0), **CLOSE)


# -------------------------------------------------------------------------------------------------- saving and loading

STATE_DICT_KEYS = [
    "candidate_embedding.weight",
    "model.embed_tokens.weight",
    "model.energy_head.weight",
    "model.final_modulation.bias",
    "model.final_modulation.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.modulation.bias",
    "model.layers.0.modulation.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.v_proj.weight",
    "model.norm.weight",
    "model.step_embeddings.weight",
    "step_size.value",
]


def test_state_dict_keys(make_model: MakeModel) -> None:
    """A renamed parameter would orphan every saved checkpoint."""
    keys = sorted(make_model(step_conditioning="adaln", num_hidden_layers=1).state_dict())
    assert keys == STATE_DICT_KEYS
    without_modulation = [key for key in STATE_DICT_KEYS if "modulation" not in key]
    assert sorted(make_model(num_hidden_layers=1).state_dict()) == without_modulation
    unconditioned = make_model(step_conditioning="none", num_landscapes=1, num_hidden_layers=1)
    assert sorted(unconditioned.state_dict()) == [key for key in without_modulation if "step_emb" not in key]


def test_saving_and_loading_is_exact(any_model: EBTForCausalLM, tmp_path: Path) -> None:
    ids = tokens(2, 6)
    with torch.no_grad():
        any_model.step_size.value.fill_(2.25)
    any_model.generation_config.update(max_new_tokens=3)
    any_model.generation_config.thinking_steps = 4
    any_model.save_pretrained(tmp_path)
    loaded, info = EBTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.training
    before, after = any_model.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in any_model.named_buffers())
    assert loaded.config.to_diff_dict() == any_model.config.to_diff_dict() | {"architectures": ["EBTForCausalLM"]}
    assert loaded.generation_config.thinking_steps == 4
    with torch.no_grad():
        # close, not equal: weights mapped from a file are aligned differently, which picks other matrix kernels
        assert_close(loaded(input_ids=ids).logits, any_model(input_ids=ids).logits, **CLOSE)
        assert torch.equal(loaded.generate(ids), any_model.generate(ids))


def test_the_auto_classes_load_a_saved_model(any_model: EBTForCausalLM, tmp_path: Path) -> None:
    any_model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is EBTConfig
    ids = tokens(1, 5)
    with torch.no_grad():
        expected = any_model(input_ids=ids).logits
        assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits, expected, **CLOSE)
        base = AutoModel.from_pretrained(tmp_path)
        assert type(base) is EBTModel
        assert_close(base(ids).last_hidden_state, any_model.model(ids).last_hidden_state, **CLOSE)


def test_loading_in_bfloat16_keeps_the_rotary_frequencies_exact(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = EBTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.candidate_embedding.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("candidate_embedding", ["linear", "shared"])
def test_resizing_the_vocabulary_keeps_old_tokens_and_ties(make_model: MakeModel, candidate_embedding: str) -> None:
    model = make_model(candidate_embedding=candidate_embedding)
    old = model.candidate_embedding.weight.detach().clone()
    model.resize_token_embeddings(45)
    assert model.config.vocab_size == 45
    assert torch.equal(model.candidate_embedding.weight[:41], old)
    tied = model.candidate_embedding.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert tied == (candidate_embedding == "shared")
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[44, 1]])).logits.shape == (1, 2, 45)
    train_once(model, torch.tensor([[44, 1, 2]]))


def test_shared_embeddings_are_one_parameter_saved_once(make_model: MakeModel, tmp_path: Path) -> None:
    from safetensors import safe_open

    model = make_model(candidate_embedding="shared")
    assert model.candidate_embedding.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "candidate_embedding.weight" not in file.keys()  # noqa: SIM118 (not a dict)
    loaded = EBTForCausalLM.from_pretrained(tmp_path)
    assert loaded.candidate_embedding.weight is loaded.model.embed_tokens.weight


# ----------------------------------------------------------------------------------------------------------- bad input


def all_masked_row() -> dict[str, Tensor]:
    """Two rows, the second without any token."""
    return {"input_ids": tokens(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}


BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "empty batch": ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, r"\(0, 4\)"),
    "empty sequence": ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"\(2, 0\)"),
    "empty embeddings": ({"inputs_embeds": torch.zeros(2, 0, 16)}, "2 row.*0 token"),
    "one dimension": ({"input_ids": tokens(4)}, r"\(4,\)"),
    "no input": ({}, "exactly one"),
    "two inputs": ({"input_ids": tokens(1, 4), "inputs_embeds": torch.zeros(1, 4, 16)}, "exactly one"),
    "id too high": ({"input_ids": torch.tensor([[1, 41]])}, "between 0 and 40.*41"),
    "id negative": ({"input_ids": torch.tensor([[1, -1]])}, "between 0 and 40.*-1"),
    "too long": ({"input_ids": tokens(1, MAX_LENGTH + 1)}, f"{MAX_LENGTH + 1} tokens.*at most {MAX_LENGTH}"),
    "row without tokens": (all_masked_row(), r"\[1\]"),
    "short mask": ({"input_ids": tokens(2, 4), "attention_mask": torch.ones(2, 3)}, r"\(2, 4\).*\(2, 3\)"),
    "long mask": ({"input_ids": tokens(2, 4), "attention_mask": torch.ones(2, 5)}, r"\(2, 4\).*\(2, 5\)"),
    "mask of other rows": ({"input_ids": tokens(2, 4), "attention_mask": torch.ones(3, 4)}, r"\(2, 4\).*\(3, 4\)"),
    "mask of one dimension": ({"input_ids": tokens(1, 4), "attention_mask": torch.ones(4)}, r"\(1, 4\).*\(4,\)"),
    "4d mask of other columns": (
        {"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 1, 4, 3, dtype=torch.bool)},
        r"\(1, 1, 4, 3\)",
    ),
    "steps 0": ({"input_ids": tokens(1, 4), "thinking_steps": 0}, "thinking_steps.*at least 1.*got 0"),
    "negative noise": ({"input_ids": tokens(1, 4), "thinking_noise_std": -0.5}, "thinking_noise_std.*-0.5"),
    "unknown option": ({"input_ids": tokens(1, 4), "thinking_stepz": 3}, "stepz.*Allowed.*steps"),
    "unknown field": ({"input_ids": tokens(1, 4), "thinking": {"stepz": 3}}, "stepz.*Allowed.*steps"),
    "landscape": ({"input_ids": tokens(1, 4), "thinking_landscapes": [0, 2]}, r"between 0 and 1.*\[0, 2\]"),
    "scales": ({"input_ids": tokens(1, 4), "thinking_step_size_scale": [1.0, 1.0, 1.0]}, "2 steps.*3 numbers"),
    "initial candidate": (
        {"input_ids": tokens(1, 4), "initial_candidate": torch.zeros(1, 3, 41)},
        r"\(1, 1, 4, 41\).*\(1, 3, 41\)",
    ),
    "initial candidates": (
        {"input_ids": tokens(1, 4), "initial_candidate": torch.zeros(1, 2, 4, 41), "thinking_candidates": 3},
        r"\(1, 3, 4, 41\).*\(1, 2, 4, 41\)",
    ),
    "logits_to_keep": ({"input_ids": tokens(1, 4), "logits_to_keep": -1}, "logits_to_keep.*-1"),
    "labels": ({"input_ids": tokens(1, 4), "labels": tokens(1, 3)}, r"\(1, 3\)"),
    "label too high": ({"input_ids": tokens(1, 4), "labels": torch.tensor([[1, 2, 3, 41]])}, "41"),
    "position_ids": ({"input_ids": tokens(1, 4), "position_ids": torch.arange(3)[None]}, r"\(1, 3\)"),
}


@pytest.mark.parametrize("case", list(BAD_INPUTS))
def test_bad_input_raises_a_value_error_that_names_it(make_model: MakeModel, case: str) -> None:
    inputs, message = BAD_INPUTS[case]
    with torch.no_grad(), pytest.raises(ValueError, match=rf"(?s){message}"):
        make_model()(**inputs)


def test_the_base_model_refuses_a_landscape_its_context_was_not_made_for(make_model: MakeModel) -> None:
    base, ids = make_model(num_landscapes=3).model, tokens(1, 4)
    with torch.no_grad(), pytest.raises(ValueError, match="between 0 and 1 for this context, got 2"):
        base(ids, candidate_embeds=torch.zeros(1, 4, 16), landscape=2, num_landscapes=2)


def test_a_context_grown_too_long_by_its_cache_raises(make_model: MakeModel) -> None:
    model = make_model()
    with torch.no_grad():
        past = model(input_ids=tokens(1, MAX_LENGTH)).past_key_values
        with pytest.raises(ValueError, match=f"{MAX_LENGTH + 1} tokens.*at most {MAX_LENGTH}"):
            model(input_ids=tokens(1, 1), past_key_values=past)


def test_broken_weights_raise_instead_of_answering(make_model: MakeModel) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            model(input_ids=tokens(1, 4))
        with pytest.raises(ValueError, match="not finite"):
            model.generate(tokens(1, 4), max_new_tokens=2)


@pytest.mark.parametrize(
    "options",
    [
        {"thinking_candidates": 2},
        {"thinking_tolerance": 0.1},
        {"thinking_target_energy": 0.0},
        {"thinking_accept_only_lower_energy": True},
    ],
)
def test_evaluation_only_thinking_raises_in_training(make_model: MakeModel, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        make_model().train()(input_ids=tokens(1, 4), **options)


BAD_ENERGY: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({}, "exactly one"),
    "both": ({"candidate_ids": tokens(1, 4), "candidate_probs": torch.ones(1, 4, 41) / 41}, "exactly one"),
    "shape": ({"candidate_ids": tokens(1, 3)}, r"\(1, 4\).*\(1, 3\)"),
    "id": ({"candidate_ids": torch.full((1, 4), 41)}, "candidate_ids.*between 0 and 40.*41"),
    "vocabulary": ({"candidate_probs": torch.ones(1, 4, 40) / 40}, "41.*40"),
    "landscape": ({"candidate_ids": tokens(1, 4), "landscape": 2}, "between 0 and 1, got 2"),
    "mask": ({"candidate_ids": tokens(1, 4), "attention_mask": torch.ones(1, 3)}, r"\(1, 4\).*\(1, 3\)"),
}


@pytest.mark.parametrize("case", list(BAD_ENERGY))
def test_bad_input_of_energy_raises_a_value_error_that_names_it(make_model: MakeModel, case: str) -> None:
    inputs, message = BAD_ENERGY[case]
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        make_model().energy(tokens(1, 4), **inputs)


def test_the_step_size_stays_exact_in_half_precision(make_model: Any, tmp_path: Path) -> None:
    model = make_model(step_size=501.3)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert_close(half.step_size.value, model.step_size.value, rtol=0, atol=0)
