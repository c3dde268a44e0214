"""Says rotary modules of transformers by a Rope and positions: towers, matchers, tables by index.

Each row builds a folder's own module from its default config, and gives ours beside it. The census compares the
two, as it does for modules that ``from_hf_config`` reads.
"""

import dataclasses
import math
import types
from collections.abc import Callable

import numpy as np
import torch

import rope_jax
from rope_jax import Affine, Axial, Frequencies, Linear, Rope, Standard, grid_positions
from rope_jax.core import patch_centers

EPS32 = 2.0**-24  # unit roundoff of float32


@dataclasses.dataclass(frozen=True)
class Case:
    """One module of transformers beside its rotation in rope_jax.

    Attributes:
      module: the name of their class.
      rope: ours.
      positions: ours, ``[T]`` or ``[T, A]``.
      cos_sin: their cos and sin ``[T, R/2 or R]``, in the dtype given.
      rotate: rotates a tensor ``[1, prefix + T, N, H]`` by their code.
      inv_freq: their frequencies ``[R/2]``, in the order of our pairs; None if their code keeps none.
      where: how the positions are made, in words or code.
      said: ours in one line, if not the repr of ``rope``.
      angle_error: radians that float32 allows at each token, ``[T]``; None for positions times frequencies.
      prefix: tokens in front that are not rotated.
      heads: N of the queries.
      name: of the part in the table.
    """

    module: str
    rope: Rope
    positions: object
    cos_sin: Callable
    rotate: Callable
    inv_freq: np.ndarray | None
    where: str = ""
    said: str = ""
    angle_error: np.ndarray | None = None
    prefix: int = 0
    heads: int = 2
    name: str = ""

    def in_words(self) -> str:
        prefix = f"Rotation.prepend_identity({self.prefix})" if self.prefix else ""
        return ", ".join(filter(None, (self.said or repr(self.rope), self.where, prefix)))


TOWERS: dict[str, Callable] = {}


def folder(*names: str):
    """Registers a function from a modeling file, and its configuration file, to the cases of that folder."""

    def register(function):
        TOWERS.update(dict.fromkeys(names, function))
        return function

    return register


def head_dim_of(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def heads_first(rotate):
    """From a function of q and k ``[1, N, T, H]`` to a function of q ``[1, T, N, H]``."""

    def rotated(q):
        q = q.transpose(1, 2)
        return rotate(q, q)[0].transpose(1, 2)

    return rotated


def as_tensor(positions, dtype=torch.float32):
    return torch.tensor(np.array(positions), dtype=dtype)


def numpy(x):
    return np.asarray(x.detach().float(), np.float64)


GRID = grid_positions(5, 7)
FAR_CELLS = np.concatenate([GRID, [[99, 1], [1023, 2047]]])


# ------------------------------------------------------------------------------------------ pictures: two axes


@folder("gemma4")
def gemma4(modeling, configuration):
    config = configuration.Gemma4VisionConfig()
    module, half = modeling.Gemma4VisionRotaryEmbedding(config), head_dim_of(config) // 2
    ids = as_tensor(FAR_CELLS, torch.int64)[None]
    base = config.rope_parameters["rope_theta"]

    def rotate(q):
        return modeling.apply_multidimensional_rope(q, *module(q, ids), ids, unsqueeze_dim=2)

    return [
        Case(
            module="Gemma4VisionRotaryEmbedding",
            rope=Rope(2 * half, Axial(sizes=(half, half), schedule=Standard(base=base)), blocks=2),
            positions=FAR_CELLS,
            cos_sin=lambda dtype: [part[0] for part in module(torch.zeros(1, dtype=dtype), ids)],
            rotate=rotate,
            inv_freq=np.tile(numpy(module.inv_freq), 2),
        )
    ]


@folder("llama4")
def llama4(modeling, configuration):
    config = configuration.Llama4VisionConfig()
    module, half = modeling.Llama4VisionRotaryEmbedding(config), head_dim_of(config) // 2
    n = config.image_size // config.patch_size
    factors = module(torch.zeros(1)).reshape(n * n + 1, -1)
    base = config.rope_parameters["rope_theta"]
    return [
        Case(
            module="Llama4VisionRotaryEmbedding",
            rope=Rope(
                2 * half,
                Axial(sizes=(half, half), schedule=Standard(base=base), axes=(1, 0)),
                layout="interleaved",
            ),
            positions=np.concatenate([grid_positions(n, n, origin=1), [[0, 0]]]),
            cos_sin=lambda dtype: (factors.real, factors.imag),
            rotate=lambda q: modeling.vision_apply_rotary_emb(q, q, factors)[0],
            inv_freq=np.angle(factors[0].numpy().astype(np.complex128)),  # the cell (1, 1)
            where="at grid_positions(n, n, origin=1) and the class token at (0, 0)",
        )
    ]


@folder("kimi_k25")
def kimi_k25(modeling, configuration):
    config = configuration.Kimi_K25VisionConfig()
    module, half = modeling.Kimi_K25VisionRotaryEmbedding(config), head_dim_of(config) // 2
    ids, base = as_tensor(FAR_CELLS), config.rope_parameters["rope_theta"]
    return [
        Case(
            module="Kimi_K25VisionRotaryEmbedding",
            rope=Rope(
                2 * half,
                Axial(sizes=(half, half), schedule=Standard(base=base), axes=(1, 0), alternating=True),
            ),
            positions=FAR_CELLS,
            cos_sin=lambda dtype: module(torch.zeros(1, dtype=dtype), ids),
            rotate=lambda q: modeling.apply_rotary_pos_emb_vision(q[0], q[0], *module(q, ids))[0][None],
            inv_freq=np.repeat(numpy(module.inv_freq), 2),
        )
    ]


@folder("pixtral")
def pixtral(modeling, configuration):
    config = configuration.PixtralVisionConfig()
    module, head_dim = modeling.PixtralVisionRotaryEmbedding(config), head_dim_of(config)
    ids, base = as_tensor(FAR_CELLS), config.rope_parameters["rope_theta"]
    odd = Linear(factor=base ** (2 / head_dim), base=base)
    return [
        Case(
            module="PixtralVisionRotaryEmbedding",
            rope=Rope(head_dim, Axial(sizes=(head_dim // 2, head_dim // 2), schedule=(Standard(base=base), odd))),
            positions=FAR_CELLS,
            cos_sin=lambda dtype: module(torch.zeros(1, dtype=dtype), ids),
            rotate=heads_first(lambda q, k: modeling.apply_rotary_pos_emb(q, k, *module(q, ids), unsqueeze_dim=0)),
            inv_freq=numpy(module.inv_freq),
        )
    ]


def sam(modeling, config, embedding, half, ids, rope, positions, rotate, **more):
    module = getattr(modeling, embedding)(config)

    def rotated(q):
        cos, sin = (part.unsqueeze(0) for part in module(q, ids))
        return rotate(q, cos, sin)

    return Case(
        module=embedding,
        rope=rope,
        positions=positions,
        cos_sin=lambda dtype: [part[0] for part in module(torch.zeros(1, dtype=dtype), ids)],
        rotate=rotated,
        inv_freq=np.tile(numpy(module.inv_freq), 2),
        **more,
    )


def memory_attention(modeling, configuration, name, function):
    """SAM 2's memory attention: the frame's queries, by column and row."""
    config = getattr(configuration, f"{name}Config")()
    width = config.memory_attention_hidden_size // config.memory_attention_downsample_rate
    half = width // config.memory_attention_num_attention_heads // 2
    ids = getattr(modeling, f"{name}MemoryAttention").precompute_positions(config)
    base = config.rope_parameters["rope_theta"]
    columns, rows = config.memory_attention_rope_feat_sizes
    rope = Rope(
        2 * half, Axial(sizes=(half, half), schedule=Standard(base=base), axes=(1, 0)), layout="interleaved"
    )

    def rotate(q, cos, sin):
        return heads_first(lambda q, k: getattr(modeling, function)(q, k, cos, sin))(q)

    case = sam(
        modeling,
        config,
        f"{name}VisionRotaryEmbedding",
        half,
        ids,
        rope,
        grid_positions(rows, columns),
        rotate,
        where="at grid_positions(rows, columns)",
    )
    return config, case


@folder("sam2_video")
def sam2_video(modeling, configuration, name="Sam2Video"):
    _, case = memory_attention(modeling, configuration, name, "apply_rotary_pos_emb_2d")
    cells, rest = case.positions, 16
    keys = np.concatenate([np.tile(cells, (2, 1)), np.zeros((rest, 2), int)])

    def rotate(k):
        cos, sin = case.cos_sin(k.dtype)
        k = k.transpose(1, 2)
        q = k[:, :, : len(cells)]
        rotated = modeling.apply_rotary_pos_emb_2d(
            q, k, cos[None, None], sin[None, None], num_k_exclude_rope=rest, repeat_freqs_k=True
        )[1]
        return rotated.transpose(1, 2)

    def cos_sin(dtype):
        cos, sin = case.cos_sin(dtype)
        ones = torch.ones(rest, cos.shape[-1])
        return torch.cat([cos, cos, ones]), torch.cat([sin, sin, 0 * ones])

    where = "at the grid's positions tiled, then (0, 0) for object pointers"
    tiled = dataclasses.replace(
        case, name="keys of two frames", positions=keys, cos_sin=cos_sin, rotate=rotate, where=where
    )
    return [case, tiled]


@folder("sam3_tracker_video")
def sam3_tracker_video(modeling, configuration):
    return sam2_video(modeling, configuration, name="Sam3TrackerVideo")


@folder("edgetam_video")
def edgetam_video(modeling, configuration):
    config, case = memory_attention(modeling, configuration, "EdgeTamVideo", "apply_rotary_pos_emb_2d_self_attn")
    module = modeling.EdgeTamVideoVisionRotaryEmbedding(config)
    ids = modeling.EdgeTamVideoMemoryAttention.precompute_positions(config, is_key=True)
    columns, rows = config.memory_attention_rope_k_sizes
    cells, temporal, rest = grid_positions(rows, columns), 8, 4
    group = np.concatenate([np.zeros((temporal, 2), int), cells])
    keys = np.concatenate([group, group, np.zeros((rest, 2), int)])

    def cos_sin(dtype):
        cos, sin = (part[0] for part in module(torch.zeros(1), ids))
        at_rest = torch.ones(temporal, cos.shape[-1])
        cos, sin = torch.cat([at_rest, cos]), torch.cat([0 * at_rest, sin])
        at_rest = at_rest[:rest]
        return torch.cat([cos, cos, at_rest]), torch.cat([sin, sin, 0 * at_rest])

    def rotate(k):
        cos, sin = (part.unsqueeze(0) for part in module(k, ids))
        k = k.transpose(1, 2)
        q = k[:, :, : len(cells)]
        rotated = modeling.apply_rotary_pos_emb_2d_cross_attn(
            q, k, cos, sin, cos, sin, num_k_exclude_rope=rest, repeat_freqs_k=2
        )[1]
        return rotated.transpose(1, 2)

    where = "at a smaller grid after temporal tokens at (0, 0), twice, then (0, 0) for object pointers"
    pooled = dataclasses.replace(
        case, name="keys of two frames", positions=keys, cos_sin=cos_sin, rotate=rotate, where=where
    )
    return [case, pooled]


@folder("sam3")
def sam3(modeling, configuration):
    config = configuration.Sam3ViTConfig()
    half, base = head_dim_of(config) // 2, config.rope_parameters["rope_theta"]
    cases = []
    for window, name in ((config.window_size, "windows"), (0, "global layers")):
        ids = modeling.Sam3ViTLayer.precompute_positions(config, window)
        n = math.isqrt(len(ids))
        axial = Axial(sizes=(half, half), schedule=Standard(base=base), axes=(1, 0))
        scale = config.window_size / n
        schedule = axial if scale == 1 else Affine(schedule=axial, scale=scale)
        rope = Rope(2 * half, schedule, layout="interleaved")

        def rotate(q, cos, sin):
            return heads_first(lambda q, k: modeling.apply_rotary_pos_emb_2d(q, k, cos, sin))(q)

        case = sam(
            modeling, config, "Sam3ViTRotaryEmbedding", half, ids, rope, grid_positions(n, n), rotate, name=name
        )
        # Their positions are multiplied by the scale, in float32, before the frequency multiplies them.
        cases.append(
            dataclasses.replace(case, inv_freq=case.inv_freq * scale, where=f"at grid_positions({n}, {n})")
        )
    return cases


@folder("dinov3_vit", "sapiens2", "eomt_dinov3")
def dinov3(modeling, configuration):
    name, kind = {
        "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTRopePositionEmbedding"),
        "sapiens2": ("Sapiens2Config", "Sapiens2RopePositionEmbedding"),
        "eomt_dinov3": ("EomtDinov3Config", "EomtDinov3RotaryEmbedding"),
    }[modeling.__name__.split(".")[2]]
    config = getattr(configuration, name)()
    module, half = getattr(modeling, kind)(config).eval(), head_dim_of(config) // 2
    base = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    height, width = 5, 7
    pixels = torch.zeros(1, 3, height * config.patch_size, width * config.patch_size)
    positions = 2 * math.pi * patch_centers(height, width)
    # Of an angle up to 2 pi: the centre is rounded four times by them and twice by us, the products three times, the
    # frequency five times, and our three products once each.
    angle_error = np.full(height * width, 2 * math.pi * 17 * EPS32)
    return [
        Case(
            module=kind,
            rope=Rope(2 * half, Axial(sizes=(half, half), schedule=Standard(base=base))),
            positions=positions,
            cos_sin=lambda dtype: module(pixels.to(dtype)),
            rotate=heads_first(lambda q, k: modeling.apply_rotary_pos_emb(q, k, *module(pixels.to(q.dtype)))),
            inv_freq=np.tile(numpy(module.inv_freq), 2),
            where="at 2 pi patch_centers(h, w)",
            angle_error=angle_error,
            prefix=1 + config.num_register_tokens,
        )
    ]


# ---------------------------------------------------------------------------------------- three axes, and more


@folder("minimax_m3_vl")
def minimax_m3_vl(modeling, configuration):
    config = configuration.MiniMaxM3VLVisionConfig()
    module, head_dim = modeling.MiniMaxM3VLVisionRotaryEmbedding(config), head_dim_of(config)
    size = 2 * (head_dim // 3 // 2)
    cells = np.concatenate([grid_positions(3, 4, 5), [[1023, 77, 2047]]])
    ids, base = as_tensor(cells), config.rope_parameters["rope_theta"]
    return [
        Case(
            module="MiniMaxM3VLVisionRotaryEmbedding",
            rope=Rope(head_dim, Axial(sizes=(size,) * 3, schedule=Standard(base=base)), rotary_dim=3 * size),
            positions=cells,
            cos_sin=lambda dtype: module(torch.zeros(1, dtype=dtype), ids),
            rotate=lambda q: modeling.apply_rotary_pos_emb_vision(q[0], q[0], *module(q, ids))[0][None],
            inv_freq=np.tile(numpy(module.inv_freq), 3),
        )
    ]


@folder("esmfold2")
def esmfold2(modeling, configuration):
    config = configuration.EsmFold2AtomEncoderConfig()
    module = modeling.EsmFold2RotaryEmbedding(config)
    spatial, uid = 2 * config.num_spatial_rope_pairs_per_axis, 2 * config.num_uid_rope_pairs
    rest = head_dim_of(config) - 3 * spatial - uid
    schedules = [Standard(base=config.spatial_rope_base_frequency)] * 3 + [
        Standard(base=config.uid_rope_base_frequency)
    ]
    axial = Axial(
        sizes=(spatial,) * 3 + (uid,) + ((rest,) if rest else ()),
        schedule=(*schedules, *((None,) if rest else ())),
    )
    atoms = np.float32([(x / 2, y / 4, -x / 8, x * 8 + y) for x in range(5) for y in range(8)])

    def cos_sin(dtype):
        parts = module(as_tensor(atoms[:, :3])[None], as_tensor(atoms[:, 3])[None], dtype)
        return [part[0] for part in parts]

    # At one ångström in each axis the angle is the frequency.
    frequencies = numpy(torch.atan2(*reversed(_cos_sin_of_one(module, config))))
    return [
        Case(
            module="EsmFold2RotaryEmbedding",
            rope=Rope(head_dim_of(config), axial),
            positions=atoms,
            cos_sin=cos_sin,
            rotate=heads_first(
                lambda q, k: modeling.apply_rotary_pos_emb(q, k, *cos_sin(q.dtype), unsqueeze_dim=0)
            ),
            inv_freq=frequencies,
            where="at float (x, y, z, residue)",
            # Their product and frequency, and our products: 11 roundings of the largest angle.
            angle_error=11 * EPS32 * np.abs(atoms).max(-1),
        )
    ]


def _cos_sin_of_one(module, config):
    """Their cos and sin where each coordinate is 1: ``[R/2]``."""
    cos, sin = module(torch.ones(1, 1, 3), torch.ones(1, 1), torch.float32)
    return [part[0, 0, : head_dim_of(config) // 2].double() for part in (cos, sin)]


@folder("musicflamingo")
def musicflamingo(modeling, configuration):
    config = configuration.MusicFlamingoConfig()
    module = modeling.MusicFlamingoRotaryEmbedding(config)
    size, base = 2 * module.inv_freq.numel(), config.rope_parameters["rope_theta"]
    length = 50
    seconds = np.float32([[30.0 * 3 + 0.04 * i for i in range(length)]])  # of the fourth window of an audio
    window = np.round(np.float64(seconds[:, :1]) / (config.audio_frame_step * 4 * length))
    longest = module.max_seq_len_cached
    by_window = -2 * math.pi * seconds * window / longest
    by_frame = -2 * math.pi * seconds * 2 * math.pi * np.arange(length) / longest
    coordinates = np.float32(np.stack([by_window[0], by_frame[0]], -1))

    def cos_sin(dtype):
        return [part[0] for part in module(torch.tensor(seconds), length)]

    return [
        Case(
            module="MusicFlamingoRotaryEmbedding",
            rope=Rope(
                config.head_dim,
                Axial(sizes=(size, size), schedule=Standard(base=base)),
                rotary_dim=2 * size,
                layout="interleaved",
            ),
            positions=coordinates,
            cos_sin=cos_sin,
            rotate=lambda q: modeling.apply_rotary_time_emb(q[:, :, 0], *cos_sin(q.dtype))[:, :, None],
            inv_freq=np.tile(numpy(module.inv_freq), 2),
            heads=1,
            where="at float (-2 pi t w / L, -(2 pi)^2 t j / L) for second t, window w, frame j",
            # Eight roundings of theirs; our coordinate and three products, and the frequency's five roundings.
            angle_error=17 * EPS32 * np.abs(coordinates).max(-1),
        )
    ]


# ------------------------------------------------------------------------------------------- matchers of pictures


@folder("efficientloftr")
def efficientloftr(modeling, configuration):
    config = configuration.EfficientLoFTRConfig()
    module, width = modeling.EfficientLoFTRRotaryEmbedding(config), config.hidden_size
    kernel, stride = config.q_aggregation_kernel_size, config.q_aggregation_stride
    features, base = [kernel + stride * (n - 1) for n in (5, 6)], config.rope_parameters["rope_theta"]

    def cos_sin(dtype):
        return [part.reshape(30, width) for part in module(torch.zeros(1, width, *features, dtype=dtype))]

    def rotate(q):  # the attention rotates before it splits the width into heads
        cos, sin = (part[None] for part in cos_sin(q.dtype))
        return modeling.apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=2)[0]

    return [
        Case(
            module="EfficientLoFTRRotaryEmbedding",
            rope=Rope(
                width,
                Axial(sizes=(width // 2, width // 2), schedule=Standard(base=base), alternating=True),
                layout="interleaved",
            ),
            positions=grid_positions(5, 6, origin=1),
            cos_sin=cos_sin,
            rotate=rotate,
            inv_freq=np.repeat(numpy(module.inv_freq), 2),
            where="at grid_positions(h, w, origin=1), the whole width as one head",
        )
    ]


@dataclasses.dataclass(frozen=True)
class Weights:
    """A schedule that gives a matrix of frequencies, learned by a checkpoint."""

    frequencies: Frequencies

    def __call__(self, rotary_dim):
        return self.frequencies


@folder("lightglue")
def lightglue(modeling, configuration):
    config = configuration.LightGlueConfig()
    torch.manual_seed(0)
    module = modeling.LightGluePositionalEncoder(config)
    matrix = numpy(module.projector.weight).T  # [A, R/2]
    points = np.float32([(0.1 * i - 0.7, 0.9 - 0.13 * i) for i in range(12)])  # normalised key points

    def cos_sin(dtype):
        ((cos, sin),) = module(torch.tensor(points))
        return cos, sin

    return [
        Case(
            module="LightGluePositionalEncoder",
            rope=Rope(2 * matrix.shape[1], Weights(Frequencies(matrix)), layout="interleaved"),
            positions=points,
            cos_sin=cos_sin,
            rotate=heads_first(
                lambda q, k: modeling.apply_rotary_pos_emb(q, k, *cos_sin(q.dtype), unsqueeze_dim=0)
            ),
            inv_freq=None,
            said=f"Rope({2 * matrix.shape[1]}, lambda R: Frequencies(weight.T), layout='interleaved')",
            where="at float key points (x, y)",
            # Two products and a sum, on both sides.
            angle_error=6 * EPS32 * (np.abs(points) @ np.abs(matrix)).max(-1),
        )
    ]


# ------------------------------------------------------------------------------------------- text: tables by index


def text_case(module, rope, length, cos_sin, rotate, inv_freq=None, **more):
    return Case(module, rope, np.arange(length), cos_sin, rotate, inv_freq, **more)


@folder("codegen", "gptj")
def gptj(modeling, configuration):
    name = {"codegen": "CodeGen", "gptj": "GPTJ"}[modeling.__name__.split(".")[2]]
    config = getattr(configuration, f"{name}Config")()
    rope = rope_jax.from_hf_config(config.to_dict(), compat="transformers").rope
    module, rotary_dim, ids = getattr(modeling, f"{name}RotaryEmbedding")(config), 2 * rope.num_pairs, 768

    def rotate(q):
        sin, cos = module(q, torch.arange(ids)[None])
        return torch.cat(
            [modeling.apply_rotary_pos_emb(q[..., :rotary_dim], sin, cos), q[..., rotary_dim:]], dim=-1
        )

    def cos_sin(dtype):
        return reversed(module(torch.zeros(1, dtype=dtype), torch.arange(ids)))

    return [text_case(f"{name}RotaryEmbedding", rope, ids, cos_sin, rotate)]


@folder("roformer")
def roformer(modeling, configuration):
    config = configuration.RoFormerConfig()
    rope, length = rope_jax.from_hf_config(config.to_dict(), compat="transformers").rope, 512
    table = modeling.RoFormerSinusoidalPositionalEmbedding(length, rope.head_dim).create_weight()
    apply = modeling.RoFormerSelfAttention.apply_rotary_position_embeddings

    def values(q):
        return apply(table[None, None].to(q.dtype), *[q.transpose(1, 2)] * 3)[2].transpose(1, 2)

    case = text_case(
        "RoFormerSinusoidalPositionalEmbedding",
        rope,
        length,
        lambda dtype: reversed(table.chunk(2, dim=-1)),
        heads_first(lambda q, k: apply(table[None, None].to(q.dtype), q, k)),
    )
    return [case, dataclasses.replace(case, name="values", rotate=values, where="values too, if rotary_value")]


@folder("clvp")
def clvp(modeling, configuration):
    config, length = configuration.ClvpEncoderConfig(), 60
    module = modeling.ClvpRotaryPositionalEmbedding(config)
    angles = module(torch.zeros(1, length, 1))[0]
    rotary_dim = angles.shape[-1]

    def rotate_one(index):
        def rotate(q):
            part = q[..., :rotary_dim].transpose(1, 2)
            parts = modeling.apply_rotary_pos_emb(
                part, part, part, angles.cos(), angles.sin(), torch.arange(length)[None]
            )
            return torch.cat([parts[index].transpose(1, 2), q[..., rotary_dim:]], dim=-1).to(q.dtype)

        return rotate

    case = text_case(
        "ClvpRotaryPositionalEmbedding",
        Rope(head_dim_of(config), Standard(), rotary_dim=rotary_dim),
        length,
        lambda dtype: (angles.cos(), angles.sin()),
        rotate_one(0),
        numpy(module.inv_freq),
    )
    return [case, dataclasses.replace(case, name="values", rotate=rotate_one(2), where="values too")]


@folder("seamless_m4t", "wav2vec2_bert", "wav2vec2_conformer")
def conformer(modeling, configuration):
    config_name, name = {
        "seamless_m4t": ("SeamlessM4TConfig", "SeamlessM4TConformer"),
        "wav2vec2_bert": ("Wav2Vec2BertConfig", "Wav2Vec2Bert"),
        "wav2vec2_conformer": ("Wav2Vec2ConformerConfig", "Wav2Vec2Conformer"),
    }[modeling.__name__.split(".")[2]]
    config, length = getattr(configuration, config_name)(), 60
    heads = getattr(config, "speech_encoder_attention_heads", None) or config.num_attention_heads
    head_dim = config.hidden_size // heads
    embedding = f"{name}RotaryPositionalEmbedding"
    module = getattr(modeling, embedding)(config)
    apply = getattr(modeling, f"{name}SelfAttention")._apply_rotary_embedding

    def table(dtype):
        module.cached_sequence_length = None
        return module(torch.zeros(1, length, 1, dtype=dtype))

    def rotate(q):
        attention = types.SimpleNamespace(num_heads=q.shape[2], head_size=q.shape[3])
        return apply(attention, q.flatten(2), table(q.dtype)).reshape(q.shape)

    return [
        text_case(
            embedding,
            Rope(head_dim, Standard(base=config.rotary_embedding_base)),
            length,
            lambda dtype: table(dtype)[:, :, 0, 0],
            rotate,
            numpy(module.inv_freq),
            where="of inputs, before the projections of queries and keys",
        )
    ]


# -------------------------------------------------------------------------------------------- what is no rotation

NO_ROTATION = {
    "bros": "sines and cosines of boxes, projected to a bias",
    "funnel": "sines and cosines of relative positions, in a product of their own",
    "jamba": "a copy of the function that its attention never calls",
    "nemotron_asr_streaming": "Transformer-XL's relative positions; a copy of the function that nothing calls",
    "nemotron_h": "a copy of the function that its attention never calls",
    "parakeet": "Transformer-XL's relative positions; a copy of the function that nothing calls",
    "pp_doclayout_v2": "sines and cosines of box differences, projected to a bias of the scores",
    "videoprism": "sines and cosines added to the inputs",
    "vjepa2": "each feature has an angle of its own: the two features of a pair differ, and lengths change",
    "xlnet": "sines and cosines of relative positions, in a product of their own",
}
