"""The dependencies of some extras, a line each: they make a layer that a change of the code leaves.

python requirements.py EXTRA[,EXTRA …]
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
wanted = [line for extra in sys.argv[1].split(",") for line in extras[extra]]
sys.stdout.write("\n".join([*project["dependencies"], *wanted]) + "\n")
