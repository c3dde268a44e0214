"""Writes transformers.json, the frequencies of transformers for every case. Needs torch and transformers.

python tests/golden/make_transformers.py
"""

import json
from pathlib import Path

from cases import CASES, ask_transformers


def main():
    # Imported here, so that tests can import this file without them.
    import torch
    import transformers

    rows = []
    for case in CASES:
        inv_freq, attention_factor = ask_transformers(case)
        # float32 as Python floats: exact, also through JSON.
        row = dict(inv_freq=inv_freq.tolist(), attention_factor=attention_factor)
        rows.append(f"{json.dumps(case['name'])}: {json.dumps(row)}")
    versions = json.dumps(dict(transformers=transformers.__version__, torch=torch.__version__))
    text = f'{{"versions": {versions},\n"cases": {{\n' + ",\n".join(rows) + "\n}}\n"
    json.loads(text)
    Path(__file__).with_name("transformers.json").write_text(text)


if __name__ == "__main__":
    main()
