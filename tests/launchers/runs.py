"""Small real runs for tests of launchers: a store, a config, and what a run left behind."""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass

from tests.launchers.conftest import ROOT


@dataclass(frozen=True)
class Small:
    """A folder with a store and a config of tiny steps over two sequence ranks."""

    folder: pathlib.Path

    @classmethod
    def make(cls, folder: pathlib.Path, steps: int = 3) -> Small:
        """Prepare the store and write the config."""
        from xdist.data.prepare import prepare_text

        prepare_text(sorted((ROOT / "xdist").glob("config*.py")), folder / "store.zarr")
        lines = (ROOT / "configs" / "tiny.toml").read_text().splitlines()
        stage = f"curriculum = [{{ length = 128, batch = 1, steps = {steps} }}]"
        lines = [stage if line.startswith("curriculum") else line for line in lines]
        (folder / "tiny.toml").write_text("\n".join(lines))
        return cls(folder)

    def words(self, name: str = "run", *more: str, degree: int = 2) -> list[str]:
        """The config and its overrides, for a run of its own name."""
        return [
            str(self.folder / "tiny.toml"),
            f"run.directory={self.folder / 'runs'}",
            f"run.name={name}",
            f"data.store={self.folder / 'store.zarr'}",
            f"parallel.ulysses={degree}",
            *more,
        ]

    def damage(self) -> None:
        """Take away what the ranks will read: DataError, exit code 5."""
        for chunk in (self.folder / "store.zarr").rglob("c/*"):
            if chunk.is_file():
                chunk.unlink()

    def run(self, name: str = "run") -> pathlib.Path:
        """The folder of a run."""
        return self.folder / "runs" / name

    def status(self, name: str = "run") -> dict[str, object]:
        """status.json of a run."""
        return json.loads((self.run(name) / "status.json").read_text())

    def losses(self, name: str = "run") -> list[float]:
        """The loss of each step."""
        lines = map(json.loads, (self.run(name) / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "eval" not in line]
