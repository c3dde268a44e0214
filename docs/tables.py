"""Writes the tables of the site that come from measured JSON files.

    python -m docs.tables

Run it after a benchmark or ``make oracle`` wrote new results. A test compares the files with the JSON. The pages
include the tables, so that no number is typed by hand.
"""

import importlib
import json
from pathlib import Path

from benchmarks import context_extension_report, gpu_compiler
from benchmarks.record import markdown

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "docs/results/tables"
SHARES = ("inv_freq", "rotation", "float32")  # of the error that float32 allows
BY_BENCHMARK = (
    "angles",
    "compilation",
    "gpu",
    "llama",
    "overhead",
    "rotate",
    "scale",
    "tpu",
)


def measured(name: str) -> dict:
    """The JSON file of a benchmark."""
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def source(kept: dict) -> str:
    """The command, the machine, the versions and the date of a measurement, as a line of small print."""
    packages = {
        name: version
        for name, version in kept.get("packages", {}).items()
        if version != "not installed"
    }
    versions = {"Python": kept["python"], "jax": kept["jax"], **packages}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"`{kept['command']}`: {kept['device']}, {kept['processor']}; {listed}; {kept['date']}."


def exactness(kept: dict) -> str:
    """The worst errors of cos and sin, by range of positions."""
    result = kept["result"]
    rows = [
        [name, f"{row['rope_jax']:.1e}", f"{row['float32']:.1e}"]
        for name, row in result["worst error"].items()
    ]
    every = result["every phase of a quarter turn, attention factor 1"]
    return "\n".join(
        [
            markdown(
                ["positions", "rope_jax", "`jnp.cos(position * inv_freq)` in float32"], rows
            ),
            "",
            f"The worst of all 2^30 phases of a quarter turn is {every:.1e}.",
        ]
    )


def census() -> dict:
    """What `make oracle` found."""
    return json.loads((ROOT / "tests/golden/census.json").read_text())


def census_summary(table: dict) -> str:
    """How many folders agree, and the worst differences."""
    folders = table["folders"].values()
    same = [row for row in folders if row["status"] == "same"]
    modules = {part["module"] for row in same for part in row["parts"].values()}
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    rows = [
        [
            name,
            str(worst["parts"]),
            f"{worst['ulp']:.1f}",
            *(f"{worst[key]:.2f}" for key in SHARES),
        ]
        for name, worst in table["worst"].items()
    ]
    return "\n".join(
        [
            f"**{len(same)} folders rotate. All are reproduced, with {len(modules)} rotary modules** ({versions}, "
            f"CPU, {table['date']}). {len(folders) - len(same)} more folders have frequencies or a rotary "
            "function, and rotate nothing.",
            "",
            markdown(
                [
                    "schedule",
                    "parts",
                    "frequencies, float32 ulp",
                    "share of the allowed error: frequencies",
                    "cos and sin",
                    "queries",
                ],
                rows,
            ),
        ]
    )


def census_folders(table: dict) -> str:
    """Each rotary module, and how it is written here."""
    rows = []
    for folder, row in table["folders"].items():
        for name, part in row["parts"].items():
            shown = folder if name == folder else f"{folder}: {name}"
            rows.append([f"{shown} `{part['module']}`", f"`{part['said']}`"])
    return markdown(["folder, part and module of transformers", "rope_jax"], rows)


def census_notes(table: dict) -> str:
    """Folders with a remark, and folders that rotate nothing."""
    rows = [
        [folder, "rotates" if row["status"] == "same" else "no rotation", row["note"]]
        for folder, row in table["folders"].items()
        if row["note"]
    ]
    return markdown(["folder", "", "remark"], rows)


def tables() -> dict[str, str]:
    """The text of each file, by name."""
    written = {}
    for name in BY_BENCHMARK:
        kept = measured(name)
        table = importlib.import_module(f"benchmarks.{name}").table(kept)
        table = table.replace(f"](benchmarks/results/{name}.md)", "](#in-full)")
        written[name] = f"{table}\n\n{source(kept)}"
    compiled = measured("gpu")["compiled"]
    written["gpu_compiled"] = (
        f"{gpu_compiler.table(compiled['programs'])}\n\n{compiled['chip']}; {compiled['date']}."
    )
    kept = measured("exactness")
    written["exactness"] = f"{exactness(kept)}\n\n{source(kept)}"
    kept = measured("context_extension")
    written["encodings"] = f"{context_extension_report.short_table(kept)}\n\n{source(kept)}"
    found = census()
    written["census_summary"] = census_summary(found)
    written["census_folders"] = census_folders(found)
    written["census_notes"] = census_notes(found)
    return {f"{name}.md": f"{text}\n" for name, text in written.items()}


if __name__ == "__main__":
    TABLES.mkdir(parents=True, exist_ok=True)
    for name, text in tables().items():
        (TABLES / name).write_text(text)
        print(TABLES / name)
