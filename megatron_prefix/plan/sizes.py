"""A model's sizes for planning: from its folder, or, where that is not here yet, from the shapes
that recipes/shapes/ holds of published models."""

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prefix.config import Recipe
from megatron_prefix.hf_folder import HfFolder, check_sizes
from megatron_prefix.modes import teachers_of
from megatron_prefix.validate import read_model

if TYPE_CHECKING:
    from megatron_prefix.mcore.hf_map import HfModel

_PACKAGE = Path(__file__).parents[1]
# A wheel carries the recipes inside the package, a checkout beside it.
SHAPES = (_PACKAGE.parent / "recipes" / "shapes", _PACKAGE / "recipes" / "shapes")


class ModelSizes:
    """Reads each model once; ``validate`` takes one as its reader."""

    def __init__(self) -> None:
        self._read: dict[str, HfModel] = {}
        self.from_shapes: dict[str, Path] = {}  # by hf_path: the file that stood in for a folder

    def __call__(self, hf_path: str, owner: str) -> "HfModel":
        """As ``validate.read_model``, or by shapes."""
        if hf_path not in self._read:
            self._read[hf_path] = self._find(hf_path, owner)
        return self._read[hf_path]

    def all_here(self, recipe: Recipe) -> bool:
        """Whether all models' folders are on this machine, tokenizers and all."""
        models = (recipe.student, *teachers_of(recipe).values())
        return all(Path(model.hf_path).is_dir() for model in models)

    def _find(self, hf_path: str, owner: str) -> "HfModel":
        file = self._known.get(Path(hf_path).name)
        if file is None or Path(hf_path).exists():
            return read_model(hf_path, owner)
        from megatron_prefix.mcore.hf_map import hf_model

        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        check_sizes(HfFolder(Path(hf_path), config, {}), owner)
        self.from_shapes[hf_path] = file
        return hf_model(hf_path, config)

    @cached_property
    def _known(self) -> dict[str, Path]:
        return {file.stem: file for folder in SHAPES for file in sorted(folder.glob("*.json"))}
