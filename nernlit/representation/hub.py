"""`save_pretrained` and `from_pretrained` of the Hugging Face Hub, for .nern files."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME
from torch import nn

from nernlit.coding import NernFile
from nernlit.predictors import Predictor
from nernlit.storage.container import read_container
from nernlit.storage.files import write_atomically

_FILE = "model.nern"


class WithPretrained(
    PyTorchModelHubMixin, ABC, library_name="nernlit", tags=["model-compression"], pipeline_tag="image-classification"
):
    """A model that is a .nern file, in a folder or a repository of the Hub.

    `save_pretrained(folder)` writes `model.nern`, a `config.json` that says what is in it, and a model card.
    `from_pretrained(folder)` reads `model.nern` and takes the options of `nernlit.load` too.
    """

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write a .nern file."""

    @classmethod
    @abstractmethod
    def from_file(cls, file: NernFile, net: nn.Module | None = None) -> Self:
        """The model of a .nern file, in evaluation mode."""

    def _save_pretrained(self, save_directory: Path) -> None:
        file = save_directory / _FILE
        self.save(file)
        header = read_container(file).header
        # Keys must differ from constructor arguments: `from_pretrained` passes such values to the constructor.
        config = {key: header[key] for key in ("network", "network_class", "num_classes", "in_chans", "specification")}
        write_atomically(save_directory / CONFIG_NAME, json.dumps(config, indent=2).encode())

    @classmethod
    def _from_pretrained(  # type: ignore[override]  # the mixin's own options are for its own kinds of files
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        proxies: Mapping[str, str] | None = None,
        resume_download: bool | None = None,
        net: nn.Module | None = None,
        predictor_classes: Sequence[type[Predictor]] = (),
        max_gib: float | None = None,
    ) -> Self:
        # huggingface_hub before 1.0 also passes the latter two; it resumes downloads in any case.
        older: dict[str, Any] = {} if proxies is None else {"proxies": proxies}
        file: str | Path = Path(model_id, _FILE)
        if not Path(model_id).is_dir():
            file = hf_hub_download(
                model_id,
                _FILE,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                **older,
            )
        return cls.from_file(NernFile.read(file, predictor_classes, max_gib), net)
