"""Of the house itself: which way the data flows, what it imports, and that the README says the truth."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks import clock, rotate
from benchmarks import context_extension_report as report
from configs import toy_lm

ROOT = Path(__file__).parents[1]


def test_a_kernel_is_imported_where_its_chip_is_and_nowhere_else():
    code = (
        "import sys, jax, jax.export, jax.numpy as jnp, rope_jax\n"
        "x, turn = jnp.ones((128, 1, 128)), rope_jax.rotation(jnp.arange(128), rope_jax.Standard()(128))\n"
        "rope_jax.rotate(x, turn)\n"
        "print('rope_jax.core.kernels.tpu' in sys.modules)\n"
        "jax.export.export(jax.jit(rope_jax.rotate), platforms=['tpu'])(x, turn)\n"
        "print('rope_jax.core.kernels.tpu' in sys.modules)\n"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == ["False", "True"]


def test_imports_nothing_heavier_than_jax_and_flax():
    code = "import sys, rope_jax; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavier = "torch transformers tensorflow keras matplotlib tyro tqdm pytest safetensors tokenizers"
    assert not set(heavier.split()) & set(loaded)


def test_two_bases_in_one_process_are_as_in_two():
    code = (
        "import sys, numpy, jax.numpy as jnp, rope_jax\n"
        "for base in map(float, sys.argv[1:]):\n"
        "    rope = rope_jax.Rope(8, rope_jax.Standard(base=base))\n"
        "    x = jnp.ones((1, 3, 2, 8))\n"
        "    print(numpy.asarray(rope(x, x, jnp.array([[7, 8, 1_000_003]]))[0]).tobytes().hex())\n"
    )

    def run(*bases):
        out = subprocess.run([sys.executable, "-c", code, *bases], capture_output=True, text=True, check=True)
        return out.stdout.split()

    assert run("1e4", "5e5") == run("1e4") + run("5e5")
    assert run("1e4") != run("5e5")


README = (ROOT / "README.md").read_text()


def test_the_examples_of_the_readme_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    q, k, y = (names[name] for name in "qky")
    assert q.shape[-1] == k.shape[-1] == 128 and np.all(np.isfinite(y))


def test_the_readme_names_files_and_targets_that_exist():
    for target in map("".join, re.findall(r"^make ([a-z]+)|`make ([a-z]+)`", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_picture_can_be_drawn_again(tmp_path):
    target = tmp_path / "overview.png"
    subprocess.run([sys.executable, ROOT / "notebooks/overview.py", target], check=True)
    assert target.read_bytes().startswith(b"\x89PNG") and target.stat().st_size > 20_000


def test_the_readme_quotes_what_was_measured():
    exactness = json.loads((ROOT / "benchmarks/results/exactness.json").read_text())
    rows = re.findall(r"^\| ([^|]*[0-9a-z]) \| (\S+e-08) \| (\S+) \|$", README, re.MULTILINE)
    assert len(rows) == 4
    worst = exactness["result"]["worst error"]
    for name, ours, float32 in rows:
        assert (ours, float32) == (f"{worst[name]['rope_jax']:.1e}", f"{worst[name]['float32']:.1e}")
    assert len(worst["around 1e7"]["by schedule"]) == 11 and "eleven schedules" in README
    assert f"{exactness['date']}, jax {exactness['jax']}" in README


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_readme_counts_what_the_census_found():
    table = json.loads((ROOT / "tests/golden/census.json").read_text())
    same = [row for row in table["folders"].values() if row["status"] == "same"]
    assert {row["status"] for row in table["folders"].values()} == {"same", "no rotation"}
    modules = {part["module"] for row in same for part in row["parts"].values()}
    said = " ".join(README.split())
    assert f"All {len(same)} folders of transformers that rotate are reproduced, with {len(modules)} rotary" in said


def test_the_readme_says_of_speed_what_was_measured():
    kept = json.loads((ROOT / "benchmarks/results/rotate.json").read_text())
    ratios = [
        float(cell.split()[0])
        for row in rotate.table(kept).splitlines()
        if row.startswith("| rotate |")
        for cell in row.split("|")[3:7:3]
    ]
    assert len(ratios) == 4 and max(ratios) < 1.3  # "about one pass over memory"


def test_the_demo_of_the_readme_is_that_of_the_script():
    assert "below 2.4 bits per byte" in " ".join(README.split())
    assert "below 2.4 bits per byte" in (toy_lm.__doc__ or "")


def test_the_study_is_kept_as_tables():
    kept = json.loads((ROOT / "benchmarks/results/context_extension.json").read_text())
    assert (ROOT / "benchmarks/results/context_extension.md").read_text() == report.tables(kept)


def test_the_page_of_encodings_says_of_the_study_what_its_numbers_say():
    kept = json.loads((ROOT / "benchmarks/results/context_extension.json").read_text())
    page = (ROOT / "docs/explanation/encodings.md").read_text()
    said = " ".join(page.split("## Results of a small study")[1].split())
    config, encodings, methods = kept["config"], kept["encodings"], kept["methods"]

    def bits(readings, octave, key="long"):
        value = report.by_octave(readings, key, config)[octave]
        return value and value[0]

    within, next_to, last = 0, 1, -1
    assert "Sinusoidal positions fail as soon as the text outgrows the training" in said
    assert bits(encodings["sinusoidal"], next_to) > bits(encodings["sinusoidal"], within) + 1
    assert "A learned table ends at its training length" in said
    assert bits(encodings["learned"], next_to) is None
    assert "ALiBi's bits do not change with the length, but far passkeys are seldom found" in said
    assert abs(bits(encodings["alibi"], last) - bits(encodings["alibi"], within)) < 0.2
    assert np.mean(report.shares(encodings["alibi"], "384 in 1024")) < 0.5
    assert "The bias is slow on long sequences, and has a cache like the others" in said
    jobs = kept["speed"]["milliseconds"]
    _, long_step, token, _ = jobs
    assert clock.ratios(jobs[long_step], "t5", "none")[1] > 1.15
    assert clock.ratios(jobs[token], "t5", "none")[1] < 1.1
    assert (
        "T5's bias reads best here, within the training length and beyond it, with a higher learning rate" in said
    )
    for octave in (within, next_to, last):
        assert min(encodings, key=lambda e: bits(encodings[e], octave) or 9) == "t5"
    tried = kept["rates tried"]["t5"]
    assert min(tried, key=tried.get) == "30.0" and tried["1.0"] > tried["30.0"] + 0.5
    assert "passkeys depend on the seed: one seed finds all, the two others hardly any" in said
    *others, one = sorted(report.shares(encodings["t5"], "768 in 1024"))
    assert one == 1 and len(others) == 2 and max(others) < 0.2
    assert "the bits are worst within the training length. Yet 48 % of the far passkeys are found" in said
    assert max(encodings, key=lambda e: bits(encodings[e], within)) == "none"
    assert f"{np.mean(report.shares(encodings['none'], '768 in 1024')):.0%}" == "48%"
    assert "Plain RoPE degrades slowly here" in said
    rope = [bits(encodings["rope"], octave) for octave in range(4)]
    assert rope[1] < rope[0] + 0.1 and rope[2] < rope[1] + 0.5 < rope[3]
    assert "No method gains bits over windows that slide" in said
    tuned = {m: bits(each["tuned"], last) for m, each in methods.items()}
    gain = {m: bits(each["plain"], last) - tuned[m] for m, each in methods.items()}
    most, *_, next_least, least = sorted(gain, key=gain.get, reverse=True)
    assert "Position interpolation needs its fine-tuning most, YaRN and LongRoPE least" in said
    assert most == "linear" and {next_least, least} == {"yarn", "longrope"}
    assert min(tuned["ntk"], tuned["llama3"]) > tuned["unmodified"] - 0.01
    assert min(tuned.values()) > bits(encodings["rope"], last, "sliding")
