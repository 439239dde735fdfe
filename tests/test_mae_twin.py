"""Laws of the masked autoencoder an Energy Transformer is compared with: as many parameters, the same masks."""

import pytest
import torch

from ebt_transformers import EnergyTransformerConfig, EnergyTransformerForImageCompletion
from ebt_transformers.modeling_et.completion_et import draw_masks
from ebt_transformers.training.mae_twin import (
    complete_images,
    count_parameters,
    mae_twin,
    mae_twin_config,
    new_mae,
    noise_of,
)


def et_config(**fields):
    shape = {"hidden_size": 64, "num_attention_heads": 4, "image_size": 16, "patch_size": 4, "visible_ratio": 0.0}
    return EnergyTransformerConfig.for_images(**{**shape, **fields})


@pytest.mark.parametrize("layers", [(1, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize(
    "fields",
    [{}, {"hidden_size": 128, "num_attention_heads": 8, "image_size": 32}, {"num_blocks": 2}, {"num_channels": 1}],
)
def test_as_many_parameters(fields, layers):
    config = et_config(**fields)
    ours = sum(each.numel() for each in EnergyTransformerForImageCompletion(config).parameters())
    twin = mae_twin(config, *layers)
    theirs = sum(each.numel() for each in twin.parameters() if each.requires_grad)
    assert ours == count_parameters(config)
    assert theirs == pytest.approx(ours, rel=0.03)
    assert (twin.config.num_hidden_layers, twin.config.decoder_num_hidden_layers) == layers
    assert len(twin.decoder.decoder_layers) == layers[1]


def test_positions_tell_patches_apart():
    # transformers leaves them at zero
    twin = mae_twin(et_config())
    for positions in (twin.vit.embeddings.position_embeddings, twin.decoder.decoder_pos_embed):
        assert not positions.requires_grad
        assert torch.pdist(positions[0]).min() > 0.1
    images = torch.rand(1, 3, 16, 16)
    mask = torch.arange(16)[None] < 8
    patches = complete_images(twin, images, mask).unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[0, :, :8]
    assert patches.std(1).mean() > 1e-3  # masked ones differ from each other


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("size", [16, 28])
def test_the_same_masks(ratio, size):
    config = et_config(mask_ratio=ratio, image_size=size)
    masked, counted = draw_masks(config, 5, torch.Generator().manual_seed(0))
    assert torch.equal(masked, counted)
    twin = mae_twin(config)
    images = torch.rand(5, 3, size, size)
    output = twin(images, noise=noise_of(masked))
    assert torch.equal(output.mask.bool(), masked)
    completed = complete_images(twin, images, masked)
    assert completed.shape == images.shape
    errors = (completed - images).square().unfold(2, 4, 4).unfold(3, 4, 4).mean((1, 4, 5)).flatten(1)
    torch.testing.assert_close((errors * masked).sum() / masked.sum(), output.loss.detach())


def test_what_is_masked_is_not_seen():
    twin = mae_twin(et_config())
    images, mask = torch.rand(2, 3, 16, 16), torch.arange(16).expand(2, 16) % 2 == 0
    changed = images.clone()
    changed[:, :, :4, :4] += 1  # patch 0
    torch.testing.assert_close(complete_images(twin, images, mask), complete_images(twin, changed, mask))
    changed[:, :, :4, 4:8] += 1  # patch 1
    assert not torch.allclose(complete_images(twin, images, mask), complete_images(twin, changed, mask))


def test_it_learns(tmp_path):
    torch.manual_seed(0)
    config = et_config()
    twin, images = mae_twin(config), torch.rand(4, 3, 16, 16)
    masked, _ = draw_masks(config, 4)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = twin(images, noise=noise_of(masked)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    twin.save_pretrained(tmp_path)
    again = type(twin).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(complete_images(again, images, masked), complete_images(twin.eval(), images, masked))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="square images only, got `image_size` 16 x 32"):
        mae_twin_config(et_config(image_size=[16, 32]))
    with pytest.raises(ValueError, match="decoder_hidden_size follows from the number of parameters"):
        mae_twin_config(et_config(), decoder_hidden_size=8)
    with pytest.raises(ValueError, match="at least 1, got 3 and 0"):
        mae_twin_config(et_config(), decoder_layers=0)
    with pytest.raises(ValueError, match="No width in multiples of 4"):
        mae_twin_config(et_config(hidden_size=8, num_memories=8), 12, 12)
    twin = mae_twin(et_config())
    with pytest.raises(ValueError, match="masks 8 of 16 patches of every image, got masks of 3"):
        complete_images(twin, torch.rand(1, 3, 16, 16), torch.arange(16)[None] < 3)
    narrow = mae_twin_config(et_config())
    narrow.decoder_hidden_size = 8
    with pytest.raises(ValueError, match="the same width"):
        new_mae(narrow)
