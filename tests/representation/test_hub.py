import copy
import json
import pickle
from pathlib import Path

import pytest
import torch

from nernlit.errors import FileFormatError, UsageError
from nernlit.representation import Representation
from tests.fakes import TinyCNN, digits_representation, tiny_representation

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_folder_holds_the_file_a_configuration_and_a_model_card(tmp_path: Path) -> None:
    representation = digits_representation()
    representation.save_pretrained(tmp_path / "model")
    names = sorted(file.name for file in (tmp_path / "model").iterdir())
    assert names == ["README.md", "config.json", "model.nern"]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["specification"] == representation.specification()
    assert config["network"] == {"name": "digits_resnet8", "num_classes": 10}
    assert "library_name: nernlit" in (tmp_path / "model" / "README.md").read_text()
    loaded = Representation.from_pretrained(tmp_path / "model")
    assert not loaded.training
    assert torch.equal(loaded(IMAGES), representation(IMAGES))


def test_options_of_save_are_passed_on_and_others_refused(tmp_path: Path) -> None:
    representation = digits_representation()
    representation.save(tmp_path / "small.nern", "int8", fold_batch_norm=True)
    representation.save_pretrained(tmp_path / "model", kept="int8", fold_batch_norm=True)
    assert (tmp_path / "model" / "model.nern").read_bytes() == (tmp_path / "small.nern").read_bytes()
    representation.save_pretrained(tmp_path / "exact")
    assert (tmp_path / "exact" / "model.nern").stat().st_size > (tmp_path / "small.nern").stat().st_size
    with pytest.raises(UsageError, match="unknown options without push_to_hub=True: fold"):
        representation.save_pretrained(tmp_path / "other", fold=True)
    assert not (tmp_path / "other").exists()


def test_an_upload_has_the_options_of_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    representation, uploaded = digits_representation(), list[bytes]()

    def push(self: Representation, repo_id: str, **options: object) -> str:
        self.save_pretrained(tmp_path / "upload", config=None)  # type: ignore[arg-type]
        uploaded.append((tmp_path / "upload" / "model.nern").read_bytes())
        return repo_id

    monkeypatch.setattr(Representation, "push_to_hub", push)
    representation.save_pretrained(tmp_path / "model", kept="int8", repo_id="me/net", push_to_hub=True)
    assert uploaded == [(tmp_path / "model" / "model.nern").read_bytes()]


def test_options_of_load_are_passed_on(tmp_path: Path) -> None:
    representation = tiny_representation()
    representation.save_pretrained(tmp_path)
    with pytest.raises(FileFormatError, match="TinyCNN that timm cannot make"):
        Representation.from_pretrained(tmp_path)
    loaded = Representation.from_pretrained(tmp_path, net=TinyCNN())
    assert torch.equal(loaded(IMAGES), representation(IMAGES))


def test_a_folder_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"model\.nern is missing"):
        Representation.from_pretrained(tmp_path)


def test_the_mixin_leaves_representations_as_they_are() -> None:
    representation = digits_representation()
    for copied in (copy.deepcopy(representation), pickle.loads(pickle.dumps(representation))):
        assert torch.equal(copied(IMAGES), representation(IMAGES))
        assert copied.specification() == representation.specification()


@pytest.mark.parametrize("older", [{}, {"proxies": {"https": "proxy:80"}, "resume_download": None}])
def test_a_repository_is_read_with_the_options_that_huggingface_hub_passes(
    older: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    representation = digits_representation()
    given: dict[str, object] = {}
    representation.save_pretrained(tmp_path)

    def download(repository: str, file: str, **options: object) -> str:
        given.update(options)
        return str(tmp_path / file)

    monkeypatch.setattr("nernlit.representation.hub.hf_hub_download", download)
    options = {"revision": "main", "cache_dir": None, "force_download": False, "local_files_only": True, "token": None}
    # As releases before 1.0 call it, also without proxies, and later ones.
    loaded = Representation._from_pretrained(model_id="some/network", **options, **older)  # type: ignore[arg-type]
    assert torch.equal(loaded(IMAGES), representation(IMAGES))
    assert given == {**options, **{name: value for name, value in older.items() if value is not None}}
