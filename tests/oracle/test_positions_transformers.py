"""Positions of text and media, and of packed pictures, against transformers."""

import functools
import importlib
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax.numpy as jnp  # noqa: E402

from rope_jax.core import multimodal_positions, packed_grid_positions, patch_centers  # noqa: E402

pytestmark = pytest.mark.oracle

WHOLE = "qwen2_vl qwen2_5_vl paddleocr_vl ernie4_5_vl_moe".split()  # a video is one grid
FRAMES = (  # text before each frame
    "qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe qwen4_exp glm4v glm4v_moe glm46v glm_ocr cohere_compass cosmos3_edge cosmos3_omni"
).split()
TEXT, IMAGE, VIDEO = 0, 1, 2


def model_of(family):
    """An object with the config and the methods that positions need, but without weights."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    cls = next(value for value in vars(module).values() if "get_rope_index" in getattr(value, "__dict__", {}))
    model = types.SimpleNamespace(config=cls.config_class())
    for name in ("get_rope_index", "get_vision_position_ids", "compute_3d_position_ids"):
        setattr(model, name, functools.partial(getattr(cls, name), model))
    return model


def random_row(rng, longest):
    """Text, pictures and videos, several of each, as (kind, length or sizes in tokens)."""
    sizes = lambda frames: (frames, *rng.integers(1, 6, 2).tolist())
    row, media = [], rng.permutation([IMAGE] * rng.integers(1, 4) + [VIDEO] * rng.integers(1, 4)).tolist()
    for k, kind in enumerate(media):
        # Two groups of the same kind need text between them; a picture and a video do not.
        if rng.random() < 0.7 or (k and media[k - 1] == kind):
            row.append((TEXT, int(rng.integers(1, 6))))
        row.append((kind, sizes(1 if kind == IMAGE else int(rng.integers(1, longest)))))
    return row + [(TEXT, int(rng.integers(1, 6)))] * int(rng.random() < 0.8)


def by_frames(row, rng):
    """Every frame of a video on its own, with a timestamp before each."""
    return [
        part
        for kind, size in row
        for part in (
            [each for _ in range(size[0]) for each in ((TEXT, int(rng.integers(1, 4))), (VIDEO, (1, *size[1:])))]
            if kind == VIDEO
            else [(kind, size)]
        )
    ]


def padded_batch(rows, side):
    """The type of each token and the attention mask, ``[B, T]``."""
    kinds = [[kind for kind, size in row for _ in range(np.prod(size))] for row in rows]
    longest = max(map(len, kinds))
    pad = lambda values: values + [0] * (longest - len(values))
    if side == "left":
        pad = lambda values: [0] * (longest - len(values)) + values
    return torch.tensor([pad(each) for each in kinds]), torch.tensor([pad([1] * len(each)) for each in kinds])


def ours(rows, side, length, steps=None, resume="plane"):
    """Positions ``[B, T, 3]`` and the position of the next token in each row."""
    batch, ends = [], []
    for b, row in enumerate(rows):
        positions, end = multimodal_positions(
            [size for _, size in row], resume=resume, steps=None if steps is None else steps[b]
        )
        space = length - len(positions)
        batch.append(jnp.pad(positions, ((space, 0) if side == "left" else (0, space), (0, 0))))
        ends.append(end)
    return np.asarray(jnp.stack(batch)), np.array(ends)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", WHOLE + FRAMES)
def test_rope_index(family, side):
    rng, model = np.random.default_rng(0), model_of(family)
    vision = model.config.vision_config
    merge, merge_time = vision.spatial_merge_size, 1
    if family == "ernie4_5_vl_moe":
        merge_time = vision.temporal_merge_size
    seen = {"several pictures": 0, "several videos": 0, "long videos": 0}
    for _ in range(20):
        whole_rows = [random_row(rng, longest=12) for _ in range(3)]
        rows = whole_rows if family in WHOLE else [by_frames(row, rng) for row in whole_rows]
        kinds, mask = padded_batch(rows, side)
        media = [each for row in whole_rows for each in grids(row)]
        raw = lambda kind, time, media=media: torch.tensor(
            [(t * time, h * merge, w * merge) for k, (t, h, w) in media if k == kind]
        )
        options, steps = {}, None
        if family == "qwen2_5_vl":
            seconds = torch.tensor(
                rng.choice([0.08, 0.175, 0.5, 1.0, 1.7], len(raw(VIDEO, 1))), dtype=torch.float32
            )
            options["second_per_grid_ts"] = seconds
            each = iter((vision.tokens_per_second * seconds).numpy())
            steps = [[1 if k == IMAGE else next(each) for k, _ in grids(row)] for row in rows]
        theirs, deltas = model.get_rope_index(
            torch.ones_like(kinds),
            mm_token_type_ids=kinds,
            image_grid_thw=raw(IMAGE, 1),
            video_grid_thw=raw(VIDEO, merge_time),
            attention_mask=mask,
            **options,
        )
        got, ends = ours(rows, side, kinds.shape[1], steps)
        np.testing.assert_array_equal(got, theirs.permute(1, 2, 0))
        lengths, largest = mask.sum(1).numpy(), got.max((1, 2))
        np.testing.assert_array_equal(largest + 1 - lengths, deltas[:, 0])
        # A row decodes from its next position, unless the last frame of a video lies beyond all text: see the docstring.
        is_long = largest + 1 > ends
        np.testing.assert_array_equal((ends - lengths)[~is_long], deltas[~is_long, 0])
        seen["several pictures"] += sum(k == IMAGE for k, _ in grids(rows[0])) > 1
        seen["several videos"] += sum(k == VIDEO for k, _ in grids(whole_rows[0])) > 1
        seen["long videos"] += is_long.sum()
    assert seen["several pictures"] > 4 and seen["several videos"] > 4
    assert (seen["long videos"] > 4) == (family in WHOLE)


def grids(row):
    return [(kind, size) for kind, size in row if kind != TEXT]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_decoded_tokens(family):
    model = model_of(family)
    rng = np.random.default_rng(1)
    rows = [[(TEXT, 3), (IMAGE, (1, 2, 5)), (TEXT, 4)], [(TEXT, 2), (IMAGE, (1, 4, 2)), (TEXT, 4)]]
    rows[1].append((TEXT, 3 + 10 + 4 - 2 - 8 - 4))
    lengths = [sum(int(np.prod(size)) for _, size in row) for row in rows]
    assert lengths[0] == lengths[1]
    _, ends = ours(rows, "right", lengths[0])
    model.rope_deltas = torch.tensor(ends - lengths)[:, None]
    past = types.SimpleNamespace(get_seq_length=lambda: lengths[0])
    new = torch.tensor(rng.normal(size=(2, 3, 8)))
    theirs = model.compute_3d_position_ids(None, new, None, None, None, past)
    got, after = multimodal_positions([3], offset=jnp.asarray(ends))
    np.testing.assert_array_equal(got, theirs.permute(1, 2, 0))
    np.testing.assert_array_equal(after, theirs[0, :, -1] + 1)


AUDIO = 3


@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_rope_index_of_omni(family):
    """Text, pictures, videos and audio; text resumes after the last position of all axes.

    Qwen3-Omni does not floor the times: the steps here are integers.
    """
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    cls = next(value for value in vars(module).values() if "get_rope_index" in getattr(value, "__dict__", {}))
    config = omni_config(family)
    model = types.SimpleNamespace(config=config, spatial_merge_size=2)
    for name in ("get_llm_pos_ids_for_vision", "get_chunked_index", "get_rope_index"):
        setattr(model, name, functools.partial(getattr(cls, name), model))
    token = {
        IMAGE: [config.vision_start_token_id, config.image_token_id, 5],
        VIDEO: [config.vision_start_token_id, config.video_token_id, 5],
        AUDIO: [config.audio_start_token_id, config.audio_token_id, 5],
    }
    rng = np.random.default_rng(2)
    for _ in range(30):
        row, tokens = [], []
        media = rng.permutation([IMAGE] * 2 + [VIDEO] * 2 + [AUDIO]).tolist()
        choices = [0.5, 1.0, 1.7] if family == "qwen2_5_omni" else [1.0, 2.0]
        seconds = iter(per_grid := rng.choice(choices, 2).astype(np.float32))
        steps, frames, images, audio = [], [], [], []
        for kind in media:
            num = int(rng.integers(1, 5))
            before, inside, after = token[kind]
            if kind == AUDIO:
                audio.append(int(rng.integers(20, 200)))
                size = audio_tokens(family, module, config, audio[-1])
            else:
                size = (1 if kind == IMAGE else int(rng.integers(1, 8)), *rng.integers(1, 6, 2).tolist())
                (images if kind == IMAGE else frames).append([size[0], 2 * size[1], 2 * size[2]])
                steps.append(1 if kind == IMAGE else config.position_id_per_seconds * next(seconds))
            row += [num + 1, size, 1]
            tokens += [5] * num + [before] + [inside] * int(np.prod(size)) + [after]
        row.append(3)
        tokens += [5] * 3
        theirs, delta = model.get_rope_index(
            torch.tensor([tokens]),
            torch.tensor(images),
            torch.tensor(frames),
            torch.ones(1, len(tokens), dtype=torch.long),
            audio_seqlens=torch.tensor(audio),
            second_per_grids=torch.tensor(per_grid),
        )
        got, end = multimodal_positions(row, steps=steps)
        np.testing.assert_array_equal(got, theirs[:, 0].T)
        assert end - len(tokens) == int(delta)


def omni_config(family):
    """The config of the model that thinks, with ids for its tokens."""
    name = {"qwen2_5_omni": "Qwen2_5OmniThinkerConfig", "qwen3_omni_moe": "Qwen3OmniMoeThinkerConfig"}[family]
    config = getattr(importlib.import_module(f"transformers.models.{family}.configuration_{family}"), name)()
    for k, name in enumerate(["image", "video", "audio", "vision_start", "audio_start"]):
        setattr(config, f"{name}_token_id", 100 + k)
    return config


def audio_tokens(family, module, config, length):
    if family == "qwen2_5_omni":
        return ((length - 1) // 2 + 1 - 2) // 2 + 1
    return int(module._get_feat_extract_output_lengths(torch.tensor(length), config.audio_config.n_window))


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_positions_of_vision_towers(merge):
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

    sizes = [(1, 4, 2), (3, 2, 6), (2, 1, 1)]
    grid_thw = torch.tensor([(t, h * merge, w * merge) for t, h, w in sizes])
    frames = [(h, w) for t, h, w in grid_thw.tolist() for _ in range(t)]
    positions, segment_ids = packed_grid_positions(frames, block=merge)
    np.testing.assert_array_equal(positions, get_vision_position_ids(grid_thw, merge))
    edges = get_vision_cu_seqlens(grid_thw)
    np.testing.assert_array_equal(np.flatnonzero(np.diff(segment_ids)) + 1, edges[1:-1])
    # MiniMax-M3 rotates by time too.
    with_time, _ = packed_grid_positions(grid_thw.tolist(), block=merge)
    np.testing.assert_array_equal(with_time, get_vision_position_ids(grid_thw, merge, include_temporal=True))


def test_nearest_positions_of_navit():
    """Their buckets compare float32 fractions; the sizes here are those at which these are exact."""
    from transformers.vision_utils import get_vision_nearest_position_ids

    sizes, table = [(4, 8), (16, 2), (32, 64), (1, 1)], 16
    positions, _ = packed_grid_positions(sizes, resize_to=table)
    theirs = get_vision_nearest_position_ids(torch.tensor(sizes), table)
    np.testing.assert_array_equal(positions @ jnp.array([table, 1]), theirs)


@pytest.mark.parametrize("sizes", [(1, 1), (14, 14), (37, 5), (3, 224)])
def test_patch_centres_of_dinov3(sizes):
    from transformers.models.dinov3_vit.modeling_dinov3_vit import get_patches_center_coordinates

    theirs = get_patches_center_coordinates(*sizes, dtype=torch.float32, device=torch.device("cpu"))
    np.testing.assert_allclose(patch_centers(*sizes), theirs, rtol=0, atol=2**-23)
