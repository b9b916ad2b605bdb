"""What this copy of the package brings along: configurations by name, and the commit it is at."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from erniesearch import __version__
from erniesearch.errors import UserError, nearest

PACKAGE = Path(__file__).resolve().parent


def configs() -> Path:
    """Folder of the shipped configurations: in the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def grids() -> Path:
    """Folder of the shipped grids (``erniesearch ablate``)."""
    return configs() / "ablation"


def config_names() -> list[str]:
    """What the shipped configurations are called: ``quickstart``, ``msmarco/en``, …"""
    files = (file for file in configs().rglob("*.yaml") if file.parent != grids())
    return sorted(file.relative_to(configs()).with_suffix("").as_posix() for file in files)


def grid_names() -> list[str]:
    """What the shipped grids are called: ``controls``, ``losses``, …"""
    return sorted(file.stem for file in grids().glob("*.yaml"))


def shipped_config(name: str) -> Path:
    """The file of a shipped configuration.

    Raises:
        UserError: if there is none of that name; names them all.
    """
    return _shipped(name, config_names(), configs(), "config file")


def config_file(given: str) -> Path:
    """A run's YAML file by path, or, where no such file is, a shipped one by name.

    Raises:
        UserError: if it is neither.
    """
    return _by_path(given, config_names()) or shipped_config(given)


def grid_file(given: str) -> Path:
    """A grid's YAML file by path, or, where no such file is, a shipped one by name.

    Raises:
        UserError: if it is neither.
    """
    return _by_path(given, grid_names()) or _shipped(given, grid_names(), grids(), "grid")


def _by_path(given: str, names: list[str]) -> Path | None:
    path = Path(given)
    return path if path.is_file() or (path.exists() and given not in names) else None


def _shipped(name: str, names: list[str], folder: Path, what: str) -> Path:
    if name not in names:
        raise UserError(
            f"{name}: no such {what}{nearest(name, names)}; shipped under a name are"
            f" {', '.join(names)}"
        )
    return folder / f"{name}.yaml"


def zero_file(given: str) -> Path:
    """``training.zero_json`` by path, or, where no such file is, a shipped one by name (zero2)."""
    path, shipped = Path(given), configs() / "deepspeed" / f"{given}.json"
    return shipped if not path.is_file() and shipped.is_file() else path


def versions(*packages: str) -> dict[str, str | None]:
    """This package's version and commit, Python's version, and those of other packages, None where
    one is not installed."""
    found: dict[str, str | None] = {
        "erniesearch": __version__, "commit": commit(), "python": platform.python_version(),
    }  # fmt: skip
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The commit of the checkout that this package is part of; None for an installed wheel, even
    one inside another project's repository, and where there is no git."""
    root = PACKAGE.parent
    if not (root / ".git").exists() or not (root / "pyproject.toml").is_file():
        return None
    if shutil.which("git") is None:
        return None
    result = subprocess.run(
        ["git", "--git-dir", str(root / ".git"), "rev-parse", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.stdout.strip() or None
