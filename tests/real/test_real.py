"""SmolLM2-135M and Gemma 3 270M, quantized files as users have them: equal to transformers, and to themselves.

Everything runs in float32. Two ways to the same logits differ by rounding only, in another order of sums: below
2e-5 of the largest logit through 30 layers.
"""

from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import rope_jax
from examples import export, generate

pytestmark = pytest.mark.real
smollm2 = pytest.mark.parametrize("real", ["smollm2"], indirect=True)

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ROUNDING = 2e-5
LENGTH = {"smollm2": 512, "gemma3": 700}  # Gemma's local layers have a window of 512
MIXED = (
    "Hello, world!  Two  spaces,\ttabs\n\nand lines.",
    " a leading space, a trailing one ",
    "naïve café: Größe, Ωμέγα, 東京タワー, привет, 👩‍👩‍👧 and 🇪🇺",
    "def f(x):\n    return {'a': [x ** 2, 0x1F, 3.14e-10]}  # 1234567890\n",
    "<|im_start|>user\nHi<|im_end|>\n<bos><start_of_turn>model\nHi<end_of_turn>",
)


def assert_same_logits(got, want, share=ROUNDING):
    """Equal up to a share of the largest logit."""
    assert np.abs(got - want).max() <= share * np.abs(want).max()


def perplexity(real, hidden, tokens) -> float:
    """Of each token ``[T]`` after the first, by the hidden states ``[1, T, D]`` before it."""
    losses = []
    for start in range(0, len(tokens) - 1, 100):
        rows = slice(start, min(start + 100, len(tokens) - 1))
        scores = jax.nn.log_softmax(real.logits(hidden[0, rows]), axis=-1)
        losses.append(-np.asarray(scores)[np.arange(len(scores)), tokens[1:][rows]])
    return float(np.exp(np.concatenate(losses).mean()))


def test_logits(real, theirs):
    torch = pytest.importorskip("torch")
    tokens = real.tokens[: LENGTH[real.name]]
    assert len(tokens) == LENGTH[real.name]
    ours = real.hidden(tokens[None])
    with torch.no_grad():
        reference = theirs[0].model(torch.tensor(tokens[None], dtype=torch.int64)).last_hidden_state
        largest = worst = 0.0
        for start in range(0, len(tokens), 100):  # all logits of Gemma are 0.7 GB
            rows = slice(start, start + 100)
            want = theirs[0].lm_head(reference[0, rows]).numpy()
            largest = max(largest, np.abs(want).max())
            worst = max(worst, np.abs(real.logits(ours[0, rows]) - want).max())
    print(f"\n{real.name}: worst difference of a logit {worst / largest:.1e} of the largest, {largest:.1f}")
    assert worst <= ROUNDING * largest
    assert perplexity(real, ours, tokens) < 60  # it knows English; a uniform guess has 49,152


def test_greedy_tokens(real, theirs):
    torch = pytest.importorskip("torch")
    prompt = real.tokens[:50]
    options = dict(do_sample=False, max_new_tokens=64, attention_mask=torch.ones(1, 50))
    with torch.no_grad():
        want = theirs[0].generate(torch.tensor(prompt[None], dtype=torch.int64), **options)
    (got,) = real.greedy([prompt])
    assert got == want[0, 50:].tolist()
    assert len(set(got)) > 10  # it repeats itself, but not one word


def test_tokens_of_text(real, theirs):
    ours, reference = real.checkpoint.tokenizer, theirs[1]
    for text in (*MIXED, real.text):
        tokens = ours.encode(text).ids
        assert tokens == reference(text).input_ids, text
        assert ours.decode(tokens, skip_special_tokens=False).removeprefix("<bos>") == text
    assert reference.eos_token_id in real.checkpoint.stop_tokens


def test_chat_template(real, theirs):
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    if real.name == "gemma3":  # not trained to chat
        assert real.checkpoint.chat_template is theirs[1].chat_template is None
        return
    want = theirs[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert generate.render(real.checkpoint, messages) == want
    assert want.endswith("<|im_start|>assistant\n")


def test_text_as_it_is_written(real):
    tokenizer = real.checkpoint.tokenizer
    for text in (*MIXED, real.text):
        tokens = tokenizer.encode(text).ids
        for length in (1, 5):
            stream = generate.TextStream(tokenizer, tokens[:length])
            parts = [stream.push(token) for token in tokens[length:]]
            assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
            assert tokenizer.decode(tokens) == tokenizer.decode(tokens[:length]) + "".join(parts)


def test_rows_of_unequal_length(real):
    prompts = [real.tokens[:3], real.tokens[200:240], real.tokens[300:400]]
    tokens, mask = rope_jax.generation.pad_prompts(prompts)
    together = real.hidden(tokens, mask=mask)
    for row, prompt in zip(together, prompts, strict=True):
        alone = real.hidden(prompt[None])[0]
        assert_same_logits(real.logits(row[: len(prompt)]), real.logits(alone))
    assert real.greedy(prompts) == [real.greedy([prompt])[0] for prompt in prompts]


def test_prompt_in_chunks(real):
    tokens = real.tokens[: LENGTH[real.name]]
    cache = real.model.init_cache(batch=1, capacity=LENGTH[real.name] + 10)
    got = real.read(cache, np.split(tokens, [200, 201, 490]))
    want = real.hidden(tokens[None])
    for rows in (slice(190, 210), slice(480, 512), slice(-10, None)):
        assert_same_logits(real.logits(got[0, rows]), real.logits(want[0, rows]))


def test_ring(real):
    """A window of 64 tokens in a ring of 128: as all tokens behind a window, and as no window where it covers them."""
    tokens, window = real.tokens[:300], 64
    sliding = real.model.clone(window=window)
    ring = sliding.init_cache(batch=1, capacity=2 * window, eviction="sliding")
    got = real.read(ring, np.split(tokens, [65, 130, 195, 260, 297, 298, 299]), sliding)
    want = real.hidden(tokens[None], sliding)
    assert_same_logits(real.logits(got[0, -100:]), real.logits(want[0, -100:]))
    plain = real.logits(real.hidden(tokens[None])[0, :100])
    assert_same_logits(real.logits(got[0, :window]), plain[:window])
    assert np.abs(real.logits(got[0, window:100]) - plain[window:]).max() > 0.01 * np.abs(plain).max()


def test_eight_bits(real):
    tokens = real.tokens[: LENGTH[real.name]]
    chunks = np.split(tokens, range(64, len(tokens), 64))
    measured = {}
    for dtype in ("float32", "int8", "float8_e4m3fn"):
        cache = real.model.init_cache(batch=1, capacity=len(tokens), dtype=jnp.dtype(dtype))
        measured[dtype] = perplexity(real, real.read(cache, chunks), tokens)
    print(f"\n{real.name}: perplexity {measured}")
    assert abs(measured["int8"] / measured["float32"] - 1) < 0.02
    assert abs(measured["float8_e4m3fn"] / measured["float32"] - 1) < 0.01


@smollm2
def test_speculative_decoding(real):
    """The draft exits early: the first layers of the target, with the target's norm and unembedding."""
    num_layers = 24
    draft = real.model.clone(num_layers=num_layers)
    first = jax.tree.map(lambda leaf: leaf[:num_layers], real.params["params"]["layers"])
    draft_params = {"params": real.params["params"] | {"layers": first}}
    prompts = [real.tokens[:50], real.tokens[100:120]]
    tokens, mask = rope_jax.generation.pad_prompts(prompts)
    out = rope_jax.generation.speculative_decode(
        real.model, real.params, draft, draft_params, tokens, mask=mask, max_new_tokens=64
    )
    print(f"\naccepted {out.accepted} of 64 tokens, {out.calls} calls")
    assert out.tokens.tolist() == [real.greedy([prompt])[0] for prompt in prompts]
    assert np.all(out.accepted > 0) and out.calls < 64


@smollm2
def test_export(real):
    """Prefill and decode step, serialized and read again, with batch and lengths left open."""
    functions = {}
    for name, step in export.steps(real.model, real.params, export.symbolic("b, t, s")).items():
        program = jax.export.export(step.call, platforms=["cpu"])(*step.arguments.values()).serialize()
        functions[name] = step.call, jax.jit(jax.export.deserialize(program).call)
    tokens, mask = rope_jax.generation.pad_prompts([real.tokens[:50], real.tokens[100:120]])
    params = export.named(real.params)
    results = []
    for prefill, decode in zip(functions["prefill"], functions["decode"], strict=True):
        cache = export.named(real.model.init_cache(batch=2, capacity=80))
        first = prefill(params, cache, tokens, mask)
        second = decode(params, first["cache"], jnp.argmax(first["logits"], axis=-1).astype(jnp.int32))
        results.append([np.asarray(each["logits"]) for each in (first, second)])
    for got, want in zip(*results, strict=True):
        np.testing.assert_array_equal(got, want)
    last = real.hidden(tokens, mask=mask)[jnp.arange(2), jnp.array([49, 19])]
    assert_same_logits(results[1][0], real.logits(last))


@smollm2
def test_the_example(real, capsys):
    """The README shows what the model answers to the question of `make real`."""
    shown = README.split("<!-- real -->\n```\n")[1].split("\n```\n<!-- /real -->")[0]
    command, asked, answer = shown.split("\n")
    question = asked.removeprefix("> ")
    assert command == f'$ make real PROMPT="{question}"'
    config = generate.Config(model=real.file, prompt=(question,), chat=True, max_new_tokens=64)
    prompt = generate.encode(config, real.checkpoint, question)
    generate.answer(config, real.checkpoint, [0], [prompt])
    assert capsys.readouterr().out == f"> {question}\n{answer}\n\n"
    (tokens,) = real.greedy([prompt], stop_token=real.checkpoint.stop_tokens)
    assert real.checkpoint.tokenizer.decode(tokens) == answer
