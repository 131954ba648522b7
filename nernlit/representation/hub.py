"""`save_pretrained` and `from_pretrained` of the Hugging Face Hub, for .nern files."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME
from torch import nn

from nernlit.coding import KeptForm, NernFile
from nernlit.errors import UsageError
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

    #: Options of `save` for the folder that is being written.
    _save_options: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def save(self, path: str | Path, kept: KeptForm = "fp32", fold_batch_norm: bool = False) -> None:
        """Write a .nern file."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        kept: KeptForm | None = None,
        fold_batch_norm: bool | None = None,
        push_to_hub: bool = False,
        config: Any = None,
        repo_id: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write a folder of the Hub.

        Args:
            save_directory: The folder.
            kept: See `save`; `fp32` by default.
            fold_batch_norm: See `save`; false by default.
            push_to_hub: Whether the folder is uploaded.
            config: Not used: the file has its own.
            repo_id: The repository to upload to; the folder's name by default.
            model_card_kwargs: Values for the model card.
            push_to_hub_kwargs: Further options of `push_to_hub`.

        Returns:
            The address of the upload, if there is one.

        Raises:
            UsageError: If there are options of an upload, and none is asked for.
        """
        if push_to_hub_kwargs and not push_to_hub:
            raise UsageError(f"unknown options without push_to_hub=True: {', '.join(push_to_hub_kwargs)}.")
        options = {"kept": kept, "fold_batch_norm": fold_batch_norm}
        before = self._save_options
        # `push_to_hub` calls this method again, without them.
        self._save_options = {**before, **{name: value for name, value in options.items() if value is not None}}
        try:
            return super().save_pretrained(
                save_directory,
                config=config,
                repo_id=repo_id,
                push_to_hub=push_to_hub,
                model_card_kwargs=model_card_kwargs,
                **push_to_hub_kwargs,
            )
        finally:
            self._save_options = dict(before)

    @classmethod
    @abstractmethod
    def from_file(cls, file: NernFile, net: nn.Module | None = None) -> Self:
        """The model of a .nern file, in evaluation mode."""

    def _save_pretrained(self, save_directory: Path) -> None:
        file = save_directory / _FILE
        self.save(file, **self._save_options)
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
        max_gib: float | None = None,
    ) -> Self:
        # huggingface_hub before 1.0 also passes proxies and resume_download; it resumes downloads in any case.
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
        return cls.from_file(NernFile.read(file, max_gib), net)
