"""Of the house itself: which way the data flows, what it imports, and that the README says the truth."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import clock, scale
from benchmarks import context_extension_report as report

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
    for name, row in exactness["result"]["worst error"].items():
        assert f"| {name} | {row['rope_jax']:.1e} | {row['float32']:.1e} |" in README
    every = exactness["result"]["every phase of a quarter turn, attention factor 1"]
    assert f"{every:.1e}" in README
    assert exactness["jax"] in README and exactness["date"] in README


@pytest.mark.parametrize("name", ["rotate", "angles", "overhead", "llama", "compilation", "tpu", "gpu"])
def test_the_readme_shows_what_the_benchmarks_found(name):
    kept = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    shown = README.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]
    assert shown == importlib.import_module(f"benchmarks.{name}").table(kept)
    speed = " ".join(README.split("## Speed")[1].split("## The demo")[0].split())
    assert f"`{kept['command']}`" in speed and kept["processor"] in speed and kept["date"] in speed
    assert f"Python {kept['python']}, jax {kept['jax']}" in speed


def test_the_readme_shows_what_was_compiled_for_many_chips():
    kept = json.loads((ROOT / "benchmarks/results/scale.json").read_text())
    shown = README.split("<!-- scale -->\n")[1].split("\n<!-- /scale -->")[0]
    assert shown == scale.table(kept)


def census_in_words():
    """The part of the README that says what `make oracle` found, made from the committed table."""
    table = json.loads((ROOT / "tests/golden/census.json").read_text())
    folders = table["folders"]
    by_status = {
        word: [f for f, row in folders.items() if row["status"] == word] for word in ("same", "no rotation")
    }
    same, other = by_status["same"], by_status["no rotation"]
    assert len(same) + len(other) == len(folders)
    modules = len({part["module"] for folder in same for part in folders[folder]["parts"].values()})
    remarks = [f"{folder} ({folders[folder]['note']})" for folder in same if folders[folder]["note"]]
    reasons = [f"{folder} ({folders[folder]['note']})" for folder in other]
    lines = [
        f"**All {len(same)} folders that rotate are reproduced, with {modules} rotary modules; none differs** "
        f"(transformers {table['versions']['transformers']}, torch {table['versions']['torch']}, jax "
        f"{table['versions']['jax']}, CPU, {table['date']}). {len(other)} more folders have frequencies or a rotary function, "
        "and rotate nothing. Worst differences over all of them; ours is exact:",
        "",
        "| schedule | parts | frequencies, float32 ulp | of what float32 allows: frequencies | cos and sin | queries |",
        "|---|---|---|---|---|---|",
    ]
    for name, worst in table["worst"].items():
        shares = " | ".join(f"{worst[key]:.2f}" for key in ("inv_freq", "rotation", "float32"))
        lines.append(f"| {name} | {worst['parts']} | {worst['ulp']:.1f} | {shares} |")
    lines += [
        "",
        "<details><summary>Which folders, and which rotate nothing</summary>",
        "",
        f"{', '.join(same)}.",
        "",
    ]
    lines += [f"Of these: {'; '.join(remarks)}."]
    lines += ["", f"No rotation: {'; '.join(reasons)}.", "", "</details>"]
    return "\n".join(lines)


def test_the_readme_says_what_the_census_found():
    written = README.split("<!-- census -->\n")[1].split("\n<!-- /census -->")[0]
    assert " ".join(written.split()) == " ".join(census_in_words().split())


def test_the_readme_shows_what_the_study_found():
    kept = json.loads((ROOT / "benchmarks/results/context_extension.json").read_text())
    assert README.split("<!-- study -->\n")[1].split("\n<!-- /study -->")[0] == report.short_table(kept)
    assert (ROOT / "benchmarks/results/context_extension.md").read_text() == report.tables(kept)
    paragraph = " ".join(README.split("## Beside other encodings")[1].split("<!-- study -->")[0].split())
    assert kept["command"].split(" --")[0] in paragraph
    assert f"{kept['processor']}, Python {kept['python']}, jax {kept['jax']}, {kept['date']}" in paragraph


def test_the_readme_says_of_the_study_what_its_numbers_say():
    kept = json.loads((ROOT / "benchmarks/results/context_extension.json").read_text())
    said = " ".join(README.split("Where the toy agrees")[1].split("## Looking")[0].split())
    config, encodings, methods = kept["config"], kept["encodings"], kept["methods"]

    def bits(readings, octave, key="long"):
        value = report.by_octave(readings, key, config)[octave]
        return value and value[0]

    within, next_to, last = 0, 1, -1
    assert bits(encodings["sinusoidal"], next_to) > bits(encodings["sinusoidal"], within) + 1
    assert bits(encodings["learned"], next_to) is None
    assert abs(bits(encodings["alibi"], last) - bits(encodings["alibi"], within)) < 0.2
    assert np.mean(report.shares(encodings["alibi"], "384 in 1024")) < 0.5
    jobs = kept["speed"]["milliseconds"]
    _, long_step, token, _ = jobs
    assert f"{clock.ratios(jobs[long_step], 't5', 'none')[1]:.2f} times a training step at 1,024" in said
    assert clock.ratios(jobs[token], "t5", "none")[1] < 1.1
    gain = {m: bits(each["plain"], last) - bits(each["tuned"], last) for m, each in methods.items()}
    most, *_, next_least, least = sorted(gain, key=gain.get, reverse=True)
    assert most == "linear" and {next_least, least} == {"yarn", "longrope"}
    for octave in (within, next_to, last):
        assert min(encodings, key=lambda e: bits(encodings[e], octave) or 9) == "t5"
    tried = kept["rates tried"]["t5"]
    assert min(tried, key=tried.get) == "30.0" and "thirty times as fast" in said
    assert tried["1.0"] > tried["30.0"] + 0.5
    rope = [bits(encodings["rope"], octave) for octave in range(4)]
    assert rope[1] < rope[0] + 0.1 and rope[2] < rope[1] + 0.5 < rope[3]
    tuned = {m: bits(each["tuned"], last) for m, each in methods.items()}
    assert min(tuned["ntk"], tuned["llama3"]) > tuned["unmodified"] - 0.01
    assert min(tuned.values()) > bits(encodings["rope"], last, "sliding")
