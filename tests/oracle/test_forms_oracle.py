"""The rotary forms of the table against the code of their own libraries, live.

transformers, diffusers, timm, rotary-embedding-torch, x-transformers, PoPE-pytorch and onnx's reference evaluator. A
library that is not installed is skipped. ``pytest -s`` prints worst differences of rotated features: rope_jax to
mpmath, the library to mpmath, rope_jax to the library.
"""

import importlib
import importlib.util
import sys
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import forms  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from forms import FORMS, NAMES, grid  # noqa: E402

pytestmark = pytest.mark.oracle

REPORT: list = []
PEERS: list = []


@pytest.fixture(autouse=True, scope="module")
def report():
    yield
    print(f"\n{'worst difference of features':100} | ours to mpmath | theirs to mpmath | ours to theirs")
    for name, *worst in REPORT:
        print(f"{name:100} | {worst[0]:14.1e} | {worst[1]:16.1e} | {worst[2]:14.1e}")


def peer(form: str, library: str, tokens):
    """Registers a function of x, a float32 tensor ``[1, T, N, H]``, that gives x rotated by the library's own code.

    ``tokens`` are the coordinates of the form's oracle (None: not rotated), or a pair of these and of the positions
    that rope_jax is given.
    """

    def register(function):
        PEERS.append(pytest.param(form, library, tokens, function, id=f"{library}: {function.__name__}"))
        return function

    return register


def named(name: str):
    (form,) = (form for form, each in zip(FORMS, NAMES, strict=True) if each == name)
    return form


def module(name: str):
    """A module of a library; a skip if the library is not installed, an error if the library has no such module."""
    library = name.split(".")[0]
    pytest.importorskip(library, reason=f"{library} is not installed")
    return importlib.import_module(name)


def timm_positions():
    """timm's module of rotary embeddings, without the rest of timm, which needs torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("timm is not installed")
    package = types.ModuleType("timm_layers")
    package.__path__ = [str(Path(spec.origin).parent / "layers")]
    sys.modules.setdefault("timm_layers", package)
    return importlib.import_module("timm_layers.pos_embed_sincos")


def as_tensor(tokens, dtype=torch.float32):
    return torch.tensor(np.array(tokens), dtype=dtype)


def hidden(*shape):
    return torch.zeros(shape)


# ---------------------------------------------------------------------------------- diffusers

DIFFUSERS = "diffusers.models.transformers.transformer_"


def embeddings():
    return module("diffusers.models.embeddings")


def diffusers_rotate(x, cos_sin, pairs=-1):
    return embeddings().apply_rotary_emb(x, cos_sin, use_real_unbind_dim=pairs, sequence_dim=1)


def diffusers_rotate_complex(x, factors):
    return embeddings().apply_rotary_emb(x, factors, use_real=False)


TEXT_AND_PICTURE = [(0, 0, 0)] * 5 + [(0, *cell) for cell in grid(6, 7)]


@peer("Flux: (16, 56, 56)", "diffusers", TEXT_AND_PICTURE)
def flux(x):
    ids = as_tensor(TEXT_AND_PICTURE)
    return diffusers_rotate(x, module(DIFFUSERS + "flux").FluxPosEmbed(10_000, [16, 56, 56])(ids))


FLUX2_TOKENS = [(0, 0, 0, i) for i in range(9)] + [(t, h, w, 0) for t in (0, 10, 20) for h, w in grid(4, 5)]


@peer("Flux 2: four axes, base 2000", "diffusers", FLUX2_TOKENS)
def flux2(x):
    return diffusers_rotate(x, module(DIFFUSERS + "flux2").Flux2PosEmbed(2000, [32] * 4)(as_tensor(FLUX2_TOKENS)))


@peer("Krea 2: (32, 48, 48), base 1000", "diffusers", TEXT_AND_PICTURE)
def krea2(x):
    embed = module(DIFFUSERS + "krea2").Krea2RotaryPosEmbed(1000, [32, 48, 48])
    return diffusers_rotate(x, embed(as_tensor(TEXT_AND_PICTURE)))


@peer("Ovis-Image: (32, 48, 48)", "diffusers", TEXT_AND_PICTURE)
def ovis_image(x):
    embed = module(DIFFUSERS + "ovis_image").OvisImagePosEmbed(10_000, [32, 48, 48])
    return diffusers_rotate(x, embed(as_tensor(TEXT_AND_PICTURE)))


@peer("Wan: (44, 42, 42)", "diffusers", grid(3, 5, 6))
def wan(x):
    cos, sin = module(DIFFUSERS + "wan").WanRotaryPosEmbed(128, (1, 2, 2), 1024)(hidden(1, 16, 3, 10, 12))
    return diffusers_rotate(x, (cos[0, :, 0], sin[0, :, 0]))


@peer("HunyuanVideo: (16, 56, 56), base 256", "diffusers", grid(3, 5, 6))
def hunyuan_video(x):
    embed = module(DIFFUSERS + "hunyuan_video").HunyuanVideoRotaryPosEmbed(2, 1, [16, 56, 56], 256.0)
    return diffusers_rotate(x, embed(hidden(1, 16, 3, 10, 12)))


@peer("HunyuanImage: two equal runs, base 256", "diffusers", grid(7, 8))
def hunyuan_image(x):
    embed = module(DIFFUSERS + "hunyuanimage").HunyuanImageRotaryPosEmbed((1, 1), (64, 64), 256.0)
    return diffusers_rotate(x, embed(hidden(1, 16, 7, 8)))


@peer("CogVideoX: (1/4, 3/8, 3/8), rows and columns resized", "diffusers", grid(2, 30, 50))
def cogvideox(x):
    return diffusers_rotate(x, embeddings().get_3d_rotary_pos_embed(64, ((1, 0), (29, 45)), (30, 50), 2))


@peer("Qwen-Image: (16, 56, 56) about the origin, text behind", "diffusers", forms.qwen_image_tokens()[1])
def qwen_image(x):
    qwen = module(DIFFUSERS + "qwenimage")
    embed = qwen.QwenEmbedRope(10_000, [16, 56, 56], scale_rope=True)
    picture, text = embed([(1, 5, 6)], device=torch.device("cpu"), max_txt_seq_len=7)
    return qwen.apply_rotary_emb_qwen(x, torch.cat([text, picture]), use_real=False)


@peer("Z-Image: (32, 48, 48), base 256", "diffusers", TEXT_AND_PICTURE)
def z_image(x):
    embed = module(DIFFUSERS + "z_image").RopeEmbedder(256.0, (32, 48, 48), (64, 64, 64))
    return diffusers_rotate_complex(x, embed(as_tensor(TEXT_AND_PICTURE, torch.int64))[None])


@peer("HiDream: (64, 32, 32)", "diffusers", TEXT_AND_PICTURE)
def hidream(x):
    hidream = module(DIFFUSERS + "hidream_image")
    return hidream.apply_rope(
        x, x, hidream.HiDreamImageEmbedND(10_000, (64, 32, 32))(as_tensor(TEXT_AND_PICTURE)[None])
    )[0]


@peer("Cosmos: NTK on one axis, time in frames of 24 per second", "diffusers", grid(4, 5, 6))
def cosmos(x):
    embed = module(DIFFUSERS + "cosmos").CosmosRotaryPosEmbed(128, rope_scale=(2.0, 1.0, 1.0))
    return diffusers_rotate(x, embed(hidden(1, 16, 4, 10, 12), fps=30), pairs=-2)


@peer("Kandinsky 5: a divisor for each axis", "diffusers", grid(3, 5, 6))
def kandinsky5(x):
    embed = module(DIFFUSERS + "kandinsky").Kandinsky5RoPE3D((16, 24, 24))
    matrices = embed((1, 3, 5, 6), [torch.arange(3), torch.arange(5), torch.arange(6)], (1.0, 2.0, 3.0))
    matrices = matrices.reshape(1, 90, 1, 32, 2, 2)  # cos, -sin; sin, cos
    return (matrices * x.reshape(*x.shape[:-1], 32, 1, 2)).sum(-1).reshape(x.shape)


LUMINA2_TOKENS = [(i, 0, 0) for i in range(6)] + [(6, *cell) for cell in grid(4, 5)]


@peer("Lumina 2: three equal runs, interleaved", "diffusers", LUMINA2_TOKENS)
def lumina2(x):
    embed = module(DIFFUSERS + "lumina2").Lumina2RotaryPosEmbed(10_000, [32, 32, 32])
    factors = embed(hidden(1, 16, 8, 10), torch.ones(1, 6, dtype=torch.int64))[3]
    return diffusers_rotate_complex(x, factors)


@peer("Lumina-Next: rows and columns by turns", "diffusers", grid(5, 6))
def lumina_next(x):
    return diffusers_rotate_complex(x, embeddings().get_2d_rotary_pos_embed_lumina(96, 5, 6).reshape(1, 30, 48))


@peer(
    "LTX-Video: a ladder that includes its end, all axes by turns, the first pair at rest",
    "diffusers",
    grid(4, 6, 7),
)
def ltx_video(x):
    ltx = module(DIFFUSERS + "ltx")
    factors = ltx.LTXVideoRotaryPosEmbed(2048)(hidden(1, 168, 2048), 4, 6, 7, (8 / 25, 32, 32))
    return torch.stack([ltx.apply_rotary_emb(x[:, :, n], factors) for n in range(x.shape[2])], dim=2)


@peer("LTX-2: the same ladder cut into heads", "diffusers", grid(4, 6, 7))
def ltx2(x):
    ltx2 = module(DIFFUSERS + "ltx2")
    coordinates = as_tensor([(t * 8 / 25, h * 32, w * 32) for t, h, w in grid(4, 6, 7)]).T[None]
    factors = ltx2.LTX2AudioVideoRotaryPosEmbed(4096, rope_type="split")(coordinates)
    return ltx2.apply_split_rotary_emb(x.flatten(2), factors).reshape(x.shape)


@peer(
    "Mochi: three axes, all heads, rows and columns from the centre of a fixed area", "diffusers", grid(2, 10, 14)
)
def mochi(x):
    cos, sin = module(DIFFUSERS + "mochi").MochiRoPE()(torch.tensor(forms.MOCHI), 2, 10, 14, dtype=torch.float32)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


@peer("Allegro: half pairs inside three blocks", "diffusers", grid(2, 4, 5))
def allegro(x):
    emb = embeddings()
    axes = emb.get_3d_rotary_pos_embed_allegro(96, ((0, 0), (4, 5)), (4, 5), 2, (2.0, 2.0, 2.0))[:3]
    # As the model does it: cos and sin of a cell are looked up by its index.
    positions = as_tensor(grid(2, 4, 5), torch.int64).T[:, None]
    return emb.apply_rotary_emb_allegro(x.transpose(1, 2), axes, positions).transpose(1, 2)


@peer("FramePack: cos and sin pooled over cells", "diffusers", grid(2, 3, 4))
def framepack(x):
    framepack = module(DIFFUSERS + "hunyuan_video_framepack")
    embed = framepack.HunyuanVideoFramepackRotaryPosEmbed(1, 1, [16, 56, 56], 256.0)
    fine = embed(torch.arange(2), 6, 8, torch.device("cpu"))
    pad = framepack.HunyuanVideoFramepackTransformer3DModel._pad_rotary_emb
    return diffusers_rotate(x, pad(None, fine, 6, 8, (1, 2, 2)))


@peer("FramePack: cos and sin pooled over cells", "diffusers", grid(2, 3, 4))
def helios(x):
    helios = module(DIFFUSERS + "helios")
    fine = helios.HeliosRotaryPosEmbed((16, 56, 56), 256.0)(torch.arange(2)[None], 6, 8, torch.device("cpu"))
    cells = (
        helios.center_down_sample_3d(helios.pad_for_3d_conv(fine, (1, 2, 2)), (1, 2, 2)).flatten(2).transpose(1, 2)
    )
    return helios.apply_rotary_emb_transposed(x, cells)


MIXED_PROMPT = (
    [(i, i, i) for i in range(5)] + [(5, 5 + h, 5 + w) for h, w in grid(4, 6)] + [(i, i, i) for i in (11, 12)]
)


@peer("Qwen3-VL: M-RoPE strided", "diffusers", MIXED_PROMPT)
def ideogram4(x):
    cos, sin = module(DIFFUSERS + "ideogram4").Ideogram4MRoPE(128, 5_000_000, (24, 20, 20))(
        as_tensor(MIXED_PROMPT)[None]
    )
    return diffusers_rotate(x, (cos[0], sin[0]), pairs=-2)


@peer("Qwen3-VL: M-RoPE strided", "diffusers", MIXED_PROMPT)
def cosmos3(x):
    embed = module(DIFFUSERS + "cosmos3").Cosmos3VLTextRotaryEmbedding(128, 5_000_000.0, (24, 20, 20))
    cos, sin = embed(as_tensor(MIXED_PROMPT).T[:, None], torch.device("cpu"), torch.float32)
    return diffusers_rotate(x, (cos[0], sin[0]), pairs=-2)


@peer("Qwen2-VL to Qwen3.5 vision: own ladders, half", "diffusers", grid(5, 6))
def glm_image(x):
    return diffusers_rotate(
        x, module(DIFFUSERS + "glm_image").GlmImageRotaryPosEmbed(80, 1)(hidden(1, 16, 5, 6)), pairs=-2
    )


# ---------------------------------------------------------------------------------- timm


def timm_rotate(x, embedding, half=False):
    return timm_positions().apply_rot_embed_cat(x.transpose(1, 2), embedding, half=half).transpose(1, 2)


@peer("timm cat with ref_feat_shape (EVA): a grid stretched to the trained grid", "timm", grid(24, 20))
def timm_cat(x):
    embed = timm_positions().RotaryEmbeddingCat(64, in_pixels=False, ref_feat_shape=[16, 16])
    return timm_rotate(x, embed.get_embed([24, 20]))


@peer("timm in_pixels: pixels: frequencies in equal ratios", "timm", grid(14, 20))
def timm_pixel(x):
    return timm_rotate(x, timm_positions().RotaryEmbeddingCat(64, in_pixels=True).get_embed([14, 20]))


@peer("lucidrains pixel: pixels: frequencies in equal steps, coordinates from -1 to 1", "timm", grid(14, 20))
def timm_pixel_linear(x):
    return timm_rotate(x, timm_positions().RotaryEmbeddingCat(64, linear_bands=True).get_embed([14, 20]))


@peer("DINOv3 at any patch: patch centres times a turn", "timm", grid(3, 4))
def timm_dinov3(x):
    return timm_rotate(x, timm_positions().RotaryEmbeddingDinoV3(64).get_embed([3, 4]), half=True)


@peer("rope-vit mixed: RoPE-Mixed in training", "timm", [(h, w) for h, w in grid(7, 8)])
def timm_mixed(x):
    embed = timm_positions().RotaryEmbeddingMixed(6 * 64, depth=1, num_heads=6, grid_indexing="ij")
    embed.freqs.data = torch.tensor(forms.MIXED).transpose(0, 1)[:, None]
    return timm_rotate(x, embed.get_embed([7, 8])[0].detach())


@peer("Qwen3-VL: M-RoPE strided", "timm", [(0, h, w) for h, w in grid(7, 8)])
def timm_mrope(x):
    embed = timm_positions().RotaryEmbeddingMRope(128, mrope_section=(24, 20, 20), temperature=5e6)
    return timm_rotate(x, embed.get_embed([7, 8]), half=True)


# ---------------------------------------------------------------------------------- lucidrains


@peer(
    "rotary-embedding-torch start_index: first rotated feature inside the head",
    "rotary-embedding-torch",
    [(i,) for i in range(50)],
)
def start_index(x):
    rotary = module("rotary_embedding_torch")
    angles = rotary.RotaryEmbedding(32)(torch.arange(50))
    return rotary.apply_rotary_emb(angles, x.transpose(1, 2), start_index=16).transpose(1, 2)


@peer(
    "lucidrains pixel: pixels: frequencies in equal steps, coordinates from -1 to 1",
    "rotary-embedding-torch",
    grid(14, 20),
)
def lucidrains_pixel(x):
    rotary = module("rotary_embedding_torch")
    angles = rotary.RotaryEmbedding(32, freqs_for="pixel", max_freq=224).get_axial_freqs(14, 20).reshape(280, 64)
    return rotary.apply_rotary_emb(angles.detach(), x.transpose(1, 2)).transpose(1, 2)


def x_transformers_xpos(x, sign):
    xt = module("x_transformers.x_transformers")
    tokens = torch.arange(20)
    embed = xt.RotaryEmbedding(64, use_xpos=True, scale_base=512)
    angles, scale = embed(tokens)
    # Their exponent counts from the middle of the sequence: a factor common to all queries, and its inverse to all keys.
    middle = (embed.scale ** (10 / 512)).repeat_interleave(2)
    return xt.apply_rotary_pos_emb(x.transpose(1, 2), angles, (scale * middle) ** sign).transpose(1, 2)


@peer("xPos (LeX): queries grow", "x-transformers", [(i,) for i in range(20)])
def xpos_queries(x):
    return x_transformers_xpos(x, 1)


@peer("xPos (LeX): keys shrink", "x-transformers", [(i,) for i in range(20)])
def xpos_keys(x):
    return x_transformers_xpos(x, -1)


@peer("PoPE: magnitudes, queries", "x-transformers", [(i,) for i in range(20)])
def pope_queries(x):
    xt = module("x_transformers.x_transformers")
    angles, _ = xt.PolarEmbedding(64, heads=2)(torch.arange(20))
    return xt.apply_polar_pos_emb(x.transpose(1, 2), angles).transpose(1, 2)


@peer("PoPE: magnitudes, keys with a learned phase", "PoPE-pytorch", [(i,) for i in range(20)])
def pope_keys(x):
    pope = module("PoPE_pytorch")
    embed = pope.PoPE(64, heads=2)
    embed.bias.data = torch.tensor(np.float32(forms.POPE_PHASE)).expand(2, 64)
    _, keys = embed.apply_pope_to_qk(embed(20), x.transpose(1, 2), x.transpose(1, 2))
    return torch.cat([keys[..., 0::2], keys[..., 1::2]], dim=-1).transpose(1, 2).detach()  # theirs are interleaved


# ---------------------------------------------------------------------------------- onnx


def onnx_rotate(x, interleaved, rotary_dim, tokens):
    """ONNX's own evaluator of RotaryEmbedding, with a table made in float64."""
    onnx, reference = module("onnx"), module("onnx.reference")
    angles = np.outer(np.arange(100), [10_000.0 ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)])
    make = onnx.helper
    value = lambda name, kind, rank: make.make_tensor_value_info(name, kind, [None] * rank)
    node = make.make_node(
        "RotaryEmbedding",
        ["x", "cos", "sin", "ids"],
        ["y"],
        interleaved=interleaved,
        rotary_embedding_dim=rotary_dim,
    )
    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    inputs = [value("x", float32, 4), value("cos", float32, 2), value("sin", float32, 2), value("ids", int64, 2)]
    graph = make.make_graph([node], "rope", inputs, [value("y", float32, 4)])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 23)])
    feeds = {
        "x": x.transpose(1, 2).numpy(),
        "cos": np.float32(np.cos(angles)),
        "sin": np.float32(np.sin(angles)),
        "ids": np.array(tokens).T,
    }
    return torch.tensor(reference.ReferenceEvaluator(model).run(None, feeds)[0]).transpose(1, 2)


ONNX_TOKENS = [(m,) for m in (0, 7, 3, 99, 50)]


@peer("ONNX RotaryEmbedding: cos and sin from a table", "onnx", ONNX_TOKENS)
def onnx_half(x):
    return onnx_rotate(x, 0, 64, ONNX_TOKENS)


@peer("GPT-J: text, interleaved, a part of the head", "onnx", ONNX_TOKENS)
def onnx_interleaved(x):
    return onnx_rotate(x, 1, 64, ONNX_TOKENS)


# ---------------------------------------------------------------------------------- transformers


def transformers_model(name: str):
    return module(f"transformers.models.{name}.modeling_{name}")


def config(base=10_000.0, rope_type="axial", **fields):
    parameters = {"rope_type": rope_type, "rope_theta": base} | fields.pop("rope", {})
    return SimpleNamespace(
        rope_parameters=parameters, max_position_embeddings=4096, standardize_rope_params=None, **fields
    )


def heads_first(x, rotate):
    """A function of q and k as ``[1, N, T, H]``."""
    return rotate(x.transpose(1, 2), x.transpose(1, 2))[0].transpose(1, 2)


# One head of 64 features, in SAM 2 and EdgeTAM.
MEMORY_ATTENTION = dict(
    memory_attention_hidden_size=64, memory_attention_downsample_rate=1, memory_attention_num_attention_heads=1
)


@peer("SAM2: own ladders, interleaved", "transformers", grid(5, 6))
def sam2(x):
    sam2 = transformers_model("sam2_video")
    cos, sin = sam2.Sam2VideoVisionRotaryEmbedding(config(**MEMORY_ATTENTION))(x, as_tensor(grid(5, 6)))
    return heads_first(x, lambda q, k: sam2.apply_rotary_pos_emb_2d(q, k, cos, sin))


@peer("SAM2: keys tiled, the tail not rotated", "transformers", forms.sam2_keys()[1])
def sam2_keys(x):
    sam2 = transformers_model("sam2_video")
    cos, sin = sam2.Sam2VideoVisionRotaryEmbedding(config(**MEMORY_ATTENTION))(x, as_tensor(grid(3, 4)))
    k = x.transpose(1, 2)
    rotate = sam2.apply_rotary_pos_emb_2d
    return rotate(k[:, :, :12], k, cos, sin, num_k_exclude_rope=5, repeat_freqs_k=True)[1].transpose(1, 2)


@peer(
    "EdgeTAM: keys in groups, first tokens of a group and the tail not rotated",
    "transformers",
    forms.edgetam_keys()[1],
)
def edgetam_keys(x):
    edgetam = transformers_model("edgetam_video")
    cos, sin = edgetam.EdgeTamVideoVisionRotaryEmbedding(config(**MEMORY_ATTENTION))(x, as_tensor(grid(3, 4)))
    k = x.transpose(1, 2)
    _, keys = edgetam.apply_rotary_pos_emb_2d_cross_attn(
        k[:, :, :12], k, cos, sin, cos[None], sin[None], num_k_exclude_rope=2, repeat_freqs_k=2
    )
    return keys.transpose(1, 2)


@peer("Llama 4 vision: x before y, from 1, class token at 0", "transformers", forms.llama4_tokens()[1])
def llama4_vision(x):
    llama4 = transformers_model("llama4")
    fields = dict(image_size=336, patch_size=14, hidden_size=2 * 88, num_attention_heads=2)
    return llama4.vision_apply_rotary_emb(x, x, llama4.Llama4VisionRotaryEmbedding(config(**fields))(x))[0]


@peer("MiniMax-M3-VL: three axes, the tail of the head not rotated", "transformers", grid(2, 4, 5))
def minimax_m3_vl(x):
    minimax = transformers_model("minimax_m3_vl")
    cos, sin = minimax.MiniMaxM3VLVisionRotaryEmbedding(config(head_dim=80))(x, as_tensor(grid(2, 4, 5)))
    return minimax.apply_rotary_pos_emb_vision(x[0], x[0], cos, sin)[0][None]


@peer(
    "Pixtral: one ladder, its even pairs for rows and its odd ones for columns, in runs", "transformers", grid(5, 6)
)
def pixtral(x):
    pixtral = transformers_model("pixtral")
    cos, sin = pixtral.PixtralVisionRotaryEmbedding(config(head_dim=64))(x, as_tensor(grid(5, 6)))
    return pixtral.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=1)[0]


@peer("Kimi K2.5 vision: columns and rows by turns", "transformers", grid(5, 6))
def kimi_k25(x):
    kimi = transformers_model("kimi_k25")
    cos, sin = kimi.Kimi_K25VisionRotaryEmbedding(config(head_dim=72))(x, as_tensor(grid(5, 6)))
    return kimi.apply_rotary_pos_emb_vision(x, x, cos, sin)[0]


@peer(
    "EfficientLoFTR: rows and columns by turns, from 1, the whole width as one head",
    "transformers",
    [(i + 1, j + 1) for i, j in grid(5, 6)],
)
def efficientloftr(x):
    loftr = transformers_model("efficientloftr")
    fields = dict(hidden_size=256, num_attention_heads=8, q_aggregation_kernel_size=4, q_aggregation_stride=4)
    embed = loftr.EfficientLoFTRRotaryEmbedding(
        config(rope_type="default", rope={"partial_rotary_factor": 4.0}, **fields)
    )
    cos, sin = (part.reshape(1, 30, 256) for part in embed(hidden(1, 256, 20, 24)))
    return loftr.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]


KEYPOINTS = [(float(np.float32(0.1 * i - 0.7)), float(np.float32(0.9 - 0.13 * i))) for i in range(12)]


@peer("LightGlue: keypoints, learned projection", "transformers", KEYPOINTS)
def lightglue(x):
    lightglue = transformers_model("lightglue")
    encoder = lightglue.LightGluePositionalEncoder(SimpleNamespace(descriptor_dim=2 * 64, num_attention_heads=2))
    encoder.projector.weight.data = torch.tensor(forms.LIGHTGLUE.T)
    ((cos, sin),) = encoder(as_tensor(KEYPOINTS)[None])
    return lightglue.apply_rotary_pos_emb(x, x, cos.detach(), sin.detach(), unsqueeze_dim=2)[0]


ATOMS = [(x / 2, y / 4, -float(x), float(y)) for x, y in grid(5, 8)]


@peer("ESMFold2: x, y, z in ångströms", "transformers", ATOMS)
def esmfold2(x):
    esmfold2 = transformers_model("esmfold2")
    settings = SimpleNamespace(
        head_dim=64, num_spatial_rope_pairs_per_axis=2, num_uid_rope_pairs=10,
        spatial_rope_base_frequency=20.0, uid_rope_base_frequency=10_000.0,
    )  # fmt: skip
    atoms = as_tensor(ATOMS)[None]
    cos, sin = esmfold2.EsmFold2RotaryEmbedding(settings)(atoms[..., :3], atoms[..., 3], torch.float32)
    return esmfold2.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]


@peer("Gemma 4 vision: half pairs inside two blocks", "transformers", grid(5, 6))
def gemma4_vision(x):
    gemma4 = transformers_model("gemma4")
    ids = as_tensor(grid(5, 6))[None]
    cos, sin = gemma4.Gemma4VisionRotaryEmbedding(config(base=100.0, head_dim=64))(x, ids)
    return gemma4.apply_multidimensional_rope(x, cos, sin, ids, unsqueeze_dim=2)


DINOV3_TOKENS = (forms.dinov3_tokens()[1], grid(3, 4))


def dinov3(x, name, class_name):
    model = transformers_model(name)
    fields = dict(hidden_size=128, num_attention_heads=2, image_size=(48, 64), patch_size=16, rope_theta=100.0)
    embed = getattr(model, class_name)(config(100.0, "default", **fields)).eval()
    cos, sin = embed(hidden(1, 3, 48, 64))
    return heads_first(x, lambda q, k: model.apply_rotary_pos_emb(q, k, cos, sin))


@peer("DINOv3: patch centres times a turn, prefix tokens", "transformers", DINOV3_TOKENS)
def dinov3_vit(x):
    return dinov3(x, "dinov3_vit", "DINOv3ViTRopePositionEmbedding")


@peer("DINOv3: patch centres times a turn, prefix tokens", "transformers", DINOV3_TOKENS)
def sapiens2(x):
    return dinov3(x, "sapiens2", "Sapiens2RopePositionEmbedding")


@peer("DINOv3: patch centres times a turn, prefix tokens", "transformers", DINOV3_TOKENS)
def eomt_dinov3(x):
    return dinov3(x, "eomt_dinov3", "EomtDinov3RotaryEmbedding")


def mrope(x, name, class_name, base, sections, **fields):
    model = transformers_model(name)
    rope = {"mrope_section": sections} | fields.pop("rope", {})
    embed = getattr(model, class_name)(config(base, "default", head_dim=128, rope=rope, **fields))
    return model, *embed(x, as_tensor(MIXED_PROMPT).T[:, None])


@peer("Qwen2-VL: M-RoPE in runs, half", "transformers", MIXED_PROMPT)
def qwen2_vl(x):
    qwen2_vl, cos, sin = mrope(x, "qwen2_vl", "Qwen2VLRotaryEmbedding", 1e6, [16, 24, 24])
    return qwen2_vl.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]


@peer("Qwen3-VL: M-RoPE strided", "transformers", MIXED_PROMPT)
def qwen3_vl(x):
    qwen3_vl, cos, sin = mrope(x, "qwen3_vl", "Qwen3VLTextRotaryEmbedding", 5e6, [24, 20, 20])
    return qwen3_vl.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]


@peer("GLM-4.1V: M-RoPE in runs, interleaved, half of the head", "transformers", MIXED_PROMPT)
def glm4v(x):
    rope = {"partial_rotary_factor": 0.5}
    glm4v, cos, sin = mrope(x, "glm4v", "Glm4vTextRotaryEmbedding", 1e4, [8, 12, 12], rope=rope)
    return glm4v.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]


@peer("Ernie 4.5 VL: M-RoPE alternating", "transformers", MIXED_PROMPT)
def ernie4_5_vl(x):
    ernie, cos, sin = mrope(x, "ernie4_5_vl_moe", "Ernie4_5_VLMoeTextRotaryEmbedding", 5e5, [22, 22, 20])
    return ernie.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]


TEXT = [(i,) for i in (0, 1, 2, 30, 500)]


ALL_TEXT = [(i,) for i in range(40)]


@peer("RoFormer: values rotated too, interleaved", "transformers", ALL_TEXT)
def roformer_values(x):
    roformer = transformers_model("roformer")
    table = roformer.RoFormerSinusoidalPositionalEmbedding(40, 64)
    sines = table.create_weight()[None, None]
    v = x.transpose(1, 2)
    return roformer.RoFormerSelfAttention.apply_rotary_position_embeddings(sines, v, v, v)[2].transpose(1, 2)


@peer("CLVP: values rotated too, half, a part of the head", "transformers", ALL_TEXT)
def clvp_values(x):
    clvp = transformers_model("clvp")
    angles = clvp.ClvpRotaryPositionalEmbedding(SimpleNamespace(projection_dim=128, num_attention_heads=2))(x)[0]
    part, rest = x[..., :32].transpose(1, 2), x[..., 32:]
    v = clvp.apply_rotary_pos_emb(part, part, part, angles.cos(), angles.sin(), torch.arange(40)[None])[2]
    return torch.cat([v.transpose(1, 2), rest], dim=-1)


@peer("wav2vec2-conformer: inputs rotated before the projections", "transformers", ALL_TEXT)
def wav2vec2_conformer(x):
    conformer = transformers_model("wav2vec2_conformer")
    settings = SimpleNamespace(hidden_size=128, num_attention_heads=2, rotary_embedding_base=10_000)
    sines = conformer.Wav2Vec2ConformerRotaryPositionalEmbedding(settings)(x)
    rotate = conformer.Wav2Vec2ConformerSelfAttention._apply_rotary_embedding
    return rotate(SimpleNamespace(num_heads=2, head_size=64), x.flatten(2), sines).reshape(x.shape)


@peer("DeepSeek-V4: trailing features", "transformers", TEXT)
def deepseek_v4(x):
    deepseek = transformers_model("deepseek_v4")
    parameters = {"main": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 64 / 192}}
    settings = SimpleNamespace(rope_parameters=parameters, max_position_embeddings=4096, head_dim=192)
    cos, sin = deepseek.DeepseekV4RotaryEmbedding(settings)(x, as_tensor(TEXT).T, layer_type="main")
    return deepseek.apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim=2)


@peer("LeRoPE: frequencies times e^alpha", "transformers", TEXT)
def mistral_large4(x):
    """Their pairs are interleaved in the projection and half after the rotation: features are laid out anew."""
    mistral = transformers_model("mistral_large4")
    embed = mistral.MistralLarge4TextRotaryEmbedding(config(1e4, "default", head_dim=128))
    embed.alpha.data = torch.tensor(np.float32(forms.STRETCH))
    cos, sin = embed(x, as_tensor(TEXT).T)
    interleaved = torch.stack([x[..., :64], x[..., 64:]], dim=-1).flatten(-2)
    return mistral.apply_rotary_pos_emb_interleave(interleaved, None, cos, sin, unsqueeze_dim=2)[0].detach()


# ---------------------------------------------------------------------------------- the comparison


@pytest.mark.parametrize(("name", "library", "tokens", "theirs"), PEERS)
def test_forms(name, library, tokens, theirs):
    form = named(name)
    at_rest = (0,) * form.num_axes
    seen, given = tokens if isinstance(tokens, tuple) else (tokens, [token or at_rest for token in tokens])
    written = form.write()
    x = np.random.default_rng(5).normal(size=(len(seen), form.heads or 2, written.head_dim)).astype(np.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = np.float64(theirs(torch.tensor(x[None]))[0])

    positions = jnp.asarray(np.array(given, np.float32 if form.floats else np.int32))
    rotation = written.rotation(positions[:, 0] if form.num_axes == 1 else positions)
    got = np.float64(written.rotate(jnp.asarray(x), rotation))
    factors, sizes = forms.expected(form, seen)
    prepared = form.prepare(np.float64(x))
    exact = forms.rotated(prepared, factors, form.pairs)
    assert got.shape == want.shape == exact.shape
    ours, both = np.abs(got - exact), np.abs(got - want)
    row = f"{library} {theirs.__name__}: {form.name}"
    REPORT.append((row, ours.max(), np.abs(want - exact).max(), both.max()))

    close = forms.tolerance(form, factors, sizes)
    assert np.all(ours <= forms.allowed(form, prepared, factors, close))
    # Most libraries round frequencies, coordinates (in units of the whole grid) and angles to float32: up to 12 units
    # of the largest angle of the pair.
    close = close + (2e-7 + 12 * forms.EPS32 * sizes.max(axis=0)) * np.maximum(1, np.abs(factors))
    assert np.all(both <= forms.allowed(form, prepared, factors, close))


# ---------------------------------------------------------------------------------- what is no rotation


def pair_lengths(x, pairs):
    return np.array([np.hypot(x[..., a], x[..., b]) for a, b in pairs])


@pytest.mark.parametrize("pairs", [forms.half(64), forms.interleaved(64)], ids=["half", "interleaved"])
@pytest.mark.parametrize("library", list(forms.NO_ROTATION))
def test_no_rotation(library, pairs):
    """Their own code changes the length of pairs, in either pairing: an angle for each feature."""
    x = torch.tensor(np.random.default_rng(6).normal(size=(1, 2, 9, 64)).astype(np.float32))  # [1, N, T, H]
    positions = torch.arange(9.0)
    if library == "V-JEPA 2":
        y = transformers_model("vjepa2").rotate_queries_or_keys(x, positions.expand(1, 2, 9))
    elif library == "hunyuan_vl of transformers":
        hunyuan = transformers_model("hunyuan_vl")
        rope = {"mrope_section": [8, 8, 8, 8]}
        ids = as_tensor([(m, 2 * m, 3 * m, 5 * m) for m in range(9)]).T[:, None]
        cos, sin = hunyuan.HunYuanVLRotaryEmbedding(config(1e4, "default", head_dim=64, rope=rope))(x, ids)
        y, _ = hunyuan.apply_rotary_pos_emb(x, x, cos, sin)
    else:
        ids = torch.stack([positions] * 3, dim=-1)[None]
        ernie = module(DIFFUSERS + "ernie_image")
        angles = ernie.ErnieImageEmbedND3(64, 256, (16, 24, 24))(ids).transpose(1, 2)
        first, second = x.chunk(2, dim=-1)
        y = x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()  # as in their processor
    assert np.abs(pair_lengths(y.numpy(), pairs) - pair_lengths(x.numpy(), pairs)).max() > 0.1
