"""Positions of diffusion transformers against diffusers, and patch centres against timm."""

import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers.models.transformers.transformer_lumina2 import Lumina2RotaryPosEmbed  # noqa: E402
from diffusers.models.transformers.transformer_mochi import MochiRoPE  # noqa: E402
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope  # noqa: E402
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed  # noqa: E402
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel  # noqa: E402
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline  # noqa: E402
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline  # noqa: E402

import rope_jax  # noqa: E402
from rope_jax.core import diffusion_positions, patch_centers  # noqa: E402

pytestmark = pytest.mark.oracle

T, SIZE, REFERENCES = 7, (4, 6), [(3, 5), (8, 2)]


def angles(positions, axes_dim, theta):
    """Each axis its own ladder, float64: ``[T, R/2]``."""
    positions = np.asarray(positions, np.float64)
    return np.concatenate(
        [positions[:, a, None] * theta ** -(np.arange(0, dim, 2) / dim) for a, dim in enumerate(axes_dim)], axis=-1
    )


def assert_same_rotation(theirs, positions, axes_dim, theta):
    """Their complex numbers are float32; their frequencies and phases are rounded to float32 at most."""
    want = angles(positions, axes_dim, theta)
    assert np.abs(theirs.numpy() - np.exp(1j * want)).max() < 2e-7 * (1 + np.abs(want).max())


def test_flux_and_kontext():
    ids = lambda size: FluxKontextPipeline._prepare_latent_image_ids(1, *size, "cpu", torch.float32)
    reference = ids(REFERENCES[0])
    reference[..., 0] = 1
    text = torch.zeros(T, 3)
    np.testing.assert_array_equal(diffusion_positions("flux", T, SIZE), torch.cat([text, ids(SIZE)]))
    np.testing.assert_array_equal(
        diffusion_positions("flux", T, SIZE, REFERENCES[0]), torch.cat([text, ids(SIZE), reference])
    )


def test_flux2():
    latent = lambda size: torch.zeros(1, 3, *size)
    theirs = [
        Flux2Pipeline._prepare_text_ids(torch.zeros(1, T, 2)),
        Flux2Pipeline._prepare_latent_ids(latent(SIZE)),
        Flux2Pipeline._prepare_image_ids([latent(size) for size in REFERENCES]),
    ]
    got = diffusion_positions("flux2", T, SIZE, *REFERENCES)
    np.testing.assert_array_equal(got, torch.cat(theirs, dim=1)[0])


@pytest.mark.parametrize("sizes", [[(1, 4, 6)], [(1, 5, 7), (1, 9, 3)], [(3, 5, 2), (1, 2, 2), (2, 4, 9)]])
def test_qwen_image(sizes):
    axes_dim = (16, 56, 56)
    pictures, text = QwenEmbedRope(10_000, axes_dim, scale_rope=True)([sizes], max_txt_seq_len=T)
    got = diffusion_positions("qwen_image", T, *sizes)
    assert_same_rotation(torch.cat([text, pictures]), got, axes_dim, 10_000.0)


def test_lumina2():
    axes_dim, mask = (32, 32, 32), torch.zeros(2, 9, dtype=torch.long)
    lengths = (T, 9)
    for b, length in enumerate(lengths):
        mask[b, :length] = 1
    rope = Lumina2RotaryPosEmbed(10_000, axes_dim)
    _, captions, pictures, rows, *_ = rope(torch.zeros(2, 4, 2 * SIZE[0], 2 * SIZE[1]), mask)
    for b, length in enumerate(lengths):
        got = diffusion_positions("lumina2", length, SIZE)
        assert_same_rotation(rows[b, : len(got)], got, axes_dim, 10_000.0)
        assert_same_rotation(torch.cat([captions[b, :length], pictures[b]]), got, axes_dim, 10_000.0)


@pytest.mark.parametrize("num_tokens", [7, 32])
@pytest.mark.parametrize("size", [(1, 4, 8), (2, 4, 8), (1, 5, 3)])
def test_z_image(size, num_tokens):
    cls = ZImageTransformer2DModel
    model = types.SimpleNamespace(
        create_coordinate_grid=cls.create_coordinate_grid,
        _pad_with_ids=lambda *each: cls._pad_with_ids(model, *each),
        _patchify_image=lambda *each: cls._patchify_image(model, *each),
    )
    frames, height, width = size
    picture, caption = torch.zeros(3, frames, 2 * height, 2 * width), torch.zeros(num_tokens, 5)
    _, _, _, picture_ids, caption_ids, *_ = cls.patchify_and_embed(model, [picture], [caption], 2, 1)
    # The caption gets more ids than tokens, and the first 32 are used: see _build_unified_sequence.
    want = torch.cat([picture_ids[0], caption_ids[0][:32]])
    np.testing.assert_array_equal(diffusion_positions("z_image", num_tokens, size), want)


def test_wan():
    rope = WanRotaryPosEmbed(128, (1, 2, 2), 64)
    cos, sin = rope(torch.zeros(1, 3, 5, 8, 12))
    got = rope_jax.grid_positions(5, 4, 6)
    assert_same_rotation(torch.complex(cos, sin)[0, :, 0, ::2], got, (44, 42, 42), 10_000.0)


def test_patch_centres_of_mochi():
    theirs = MochiRoPE()._get_positions(1, 14, 25, dtype=torch.float32)[:, 1:]
    np.testing.assert_allclose(96 * patch_centers(14, 25, normalize="area"), theirs, rtol=0, atol=192 * 2**-23 * 2)


@pytest.mark.parametrize(("ours", "theirs"), [("own", "separate"), ("longer", "max"), ("shorter", "min")])
def test_patch_centres_of_timm(ours, theirs):
    build_grid = pytest.importorskip("timm.layers.pos_embed_sincos")._build_grid
    grid = build_grid([14, 9], grid_type="centered", normalize_coords=theirs).reshape(-1, 2)
    np.testing.assert_allclose(patch_centers(14, 9, normalize=ours), grid, rtol=0, atol=2**-22)
