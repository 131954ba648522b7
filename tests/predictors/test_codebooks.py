import copy
import math
import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

import nernlit
from nernlit.cli.main import main, run
from nernlit.coding import part_bytes
from nernlit.errors import CheckpointError, FileFormatError, UsageError
from nernlit.kernels import AllKernels
from nernlit.predictors import Codebooks, PredictorEnsemble
from nernlit.predictors.codes import decode_codes, encode_codes, pack_codes, unpack_codes
from nernlit.representation import Representation, load_representation, without_fitting
from nernlit.storage.container import Contents, read_container, write_container
from nernlit.training import ReconOnly
from tests.fakes import CONFIGS, QUICK, digits_representation, quiet_trainer, tiny_original

EVERY = [(share, scale) for share in ("network", "stage", "layer") for scale in ("none", "layer", "filter")]


def _adam(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def _steps(count: int) -> DataLoader[int]:
    return DataLoader(range(count), batch_size=None)  # type: ignore[arg-type]


def _tiny(order: str = "in_filter", **options: object) -> Representation:
    predictor = Codebooks(**{"codebooks": 2, "bits": 3, "kernel_size": 5, "iterations": 3, **options})  # type: ignore[arg-type]
    return Representation(tiny_original(), predictor, order=order)  # type: ignore[arg-type]


def _digits(**options: object) -> Representation:
    predictor = Codebooks(**{"codebooks": 2, "bits": 4, "iterations": 3, **options})  # type: ignore[arg-type]
    return Representation(digits_representation().original, predictor, order="none")


@torch.no_grad()
def _error(representation: Representation) -> float:
    """The root-mean-square error in units of the scale."""
    layout = representation.layout
    errors = layout.vector(representation.weights()) - layout.vector(representation.original_weights())
    return float(errors.square().mean().sqrt() / representation.scale)


def _predictor(representation: Representation) -> Codebooks:
    assert isinstance(representation.predictor, Codebooks)
    return representation.predictor


@pytest.mark.parametrize(("share", "scale"), EVERY)
def test_a_kernel_is_the_scaled_sum_of_its_codewords(share: str, scale: str) -> None:
    representation = _tiny(share=share, scale=scale)
    predictor = _predictor(representation)
    kernels = representation.kernels()
    filters = [layer.shape[0] for layer in representation.layout.layers]
    for row, (layer, filter_, channel) in enumerate(representation.addresses.tolist()):
        before = sum(own.shape[0] * own.shape[1] for own in representation.layout.layers[:layer])
        codes = predictor.codes[before + filter_ * representation.layout.layers[layer].shape[1] + channel]
        stage = len(set(accumulate(filters[: layer + 1], max))) - 1
        books = predictor.codewords[{"network": 0, "stage": stage, "layer": layer}[share]]
        flat = books[0, codes[0]] + books[1, codes[1]]
        if scale != "none":
            flat = flat * predictor.scales.values[layer if scale == "layer" else sum(filters[:layer]) + filter_]
        assert torch.allclose(kernels[row].flatten(), flat * representation.scale, atol=1e-6)


@pytest.mark.parametrize(("share", "scale"), EVERY)
@pytest.mark.parametrize("order", ["none", "in_filter", "cross_filter"])
def test_it_starts_near_the_original(share: str, scale: str, order: str) -> None:
    coarse, fine = (_error(_tiny(order, share=share, scale=scale, bits=bits)) for bits in (2, 6))
    assert fine < coarse < 1
    assert fine < 0.35


def test_tiles_have_codes_too(tmp_path: Path) -> None:
    original = digits_representation().original
    representation = Representation(original, Codebooks(3, 6, scale="filter"), layers="all", pointwise="tile")
    assert _error(representation) < 0.3
    representation.save(tmp_path / "net.nern")
    loaded = nernlit.load(tmp_path / "net.nern")
    for key, value in representation.reconstructed().items():
        assert torch.equal(loaded.reconstructed()[key], value)


def test_more_codebooks_bits_and_beam_have_a_smaller_error() -> None:
    base = _error(_digits(beam=4))
    assert _error(_digits(codebooks=3)) < base
    assert _error(_digits(bits=5)) < base
    assert _error(_digits(beam=16)) < base


def test_with_a_price_more_codewords_take_no_more_bytes() -> None:
    files, errors = [], []
    for options in ({"bits": 4}, {"bits": 6, "price": 0.055}):
        representation = _digits(**options)
        errors.append(_error(representation))
        files.append(len(_predictor(representation).stored()["codes"]))
    assert files[1] < files[0]
    assert errors[1] < 0.97 * errors[0]


def test_entries_outside_of_smaller_kernels_do_not_count() -> None:
    representation = _tiny()
    predictor = _predictor(representation)
    mask = representation.learned.mask()
    assert mask is not None
    noise = torch.where(mask, 0, 100 * torch.randn_like(representation.target))
    other = copy.deepcopy(predictor)
    blocks = representation.target / representation.scale
    for fitted, given in ((predictor, blocks), (other, blocks + noise)):
        fitted.fit(given, representation.addresses, mask.float())
    assert torch.equal(predictor.codes, other.codes)
    assert torch.equal(predictor.codewords, other.codewords)


def test_sizes_count_parameters_codes_and_the_whole_file(tmp_path: Path) -> None:
    representation = _digits(scale="filter")
    representation.save(tmp_path / "net.nern")
    sizes = representation.sizes()
    kernels, filters = representation.layout.num_kernels, sum(own.shape[0] for own in representation.layout.layers)
    assert sizes.predictor_params == 2 * 16 * 9 + filters
    assert sizes.code_bits == kernels * 2 * 4
    assert sizes.cr_paper == sizes.predictor_params / representation.layout.num_weights
    assert sizes.file_bytes == (tmp_path / "net.nern").stat().st_size
    parts = part_bytes(read_container(tmp_path / "net.nern"))
    coded = parts["predictor"] - 4 * sizes.predictor_params
    assert 0.8 * kernels < coded < kernels + 16  # packed, two codes of four bits are a byte


@pytest.mark.parametrize("bits", [1, 3, 8, 11, 16])
def test_packed_codes_are_unpacked(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (37, 3), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = pack_codes(codes, bits)
    assert packed.shape == ((37 * 3 * bits + 7) // 8,)
    assert torch.equal(unpack_codes(packed, bits, 37, 3), codes)


def test_coded_codes_are_decoded_and_frequent_ones_take_few_bits() -> None:
    codes = torch.randint(0, 64, (3000, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    codes[1000:] //= 16
    coded = encode_codes(codes, [1000, 0, 2000])
    assert torch.equal(decode_codes(coded, [1000, 0, 2000], 2, 6), codes)
    assert len(coded) < (2 * 1000 * 6 + 2 * 2000 * 2) / 8 + 40


@pytest.mark.parametrize(("share", "scale"), EVERY)
def test_a_file_gives_the_same_network(share: str, scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    representation = _digits(share=share, scale=scale, bits=3)
    representation.save(tmp_path / "net.nern")
    monkeypatch.setattr(Codebooks, "fit", None)  # is not called
    loaded = nernlit.load(tmp_path / "net.nern")
    for key, value in representation.reconstructed().items():
        assert torch.equal(loaded.reconstructed()[key], value)
    assert loaded.specification() == representation.specification()


def test_a_given_representation_takes_the_codes_of_a_file(tmp_path: Path) -> None:
    stored = _digits()
    stored.save(tmp_path / "net.nern")
    with without_fitting():
        given = _digits()
    assert not _predictor(given).codes.any()
    load_representation(tmp_path / "net.nern", given)
    assert torch.equal(_predictor(given).codes, _predictor(stored).codes)
    assert torch.equal(given.kernels(), stored.kernels())


def test_codes_are_computed_once_for_a_fit_and_all_that_starts_from_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fit = Codebooks.fit
    monkeypatch.setattr(Codebooks, "fit", lambda self, *given: (calls.append(1), fit(self, *given))[1])
    options = ["--model.representation.predictor=Codebooks", "--model.representation.predictor.bits=3"]
    options += ["--model.representation.predictor.codebooks=2", "--model.optimizer=torch.optim.Adam"]
    options += ["--model.optimizer.lr=0.001", *QUICK[5:], "--trainer.max_epochs=1"]
    run(["fit", "-c", str(CONFIGS / "digits_h96.yaml"), *options, "--data.steps_per_epoch=2"])
    assert len(calls) == 1
    file = "runs/digits_h96/version_0/checkpoints/last.ckpt"
    loaded = ReconOnly.load_from_checkpoint(file)
    given = ["-c", str(CONFIGS / "digits_h96_decoupled.yaml"), *options, "--data.batch_size=500"]
    started = run(["fit", *given, "--model.reconstruction.steps=0", f"--model.init_from={file}"]).model
    assert len(calls) == 1
    assert torch.equal(_predictor(started.representation).codes, _predictor(loaded.representation).codes)
    assert _predictor(loaded.representation).codes.any()


def test_files_of_other_codes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.nern"
    _digits().save(path)
    header, tensors = read_container(path)
    codes = tensors["predictor.codes"]
    for forged in (codes[:-1], codes.float(), codes[None]):
        write_container(path, Contents(header, {**tensors, "predictor.codes": forged}))
        with pytest.raises(FileFormatError, match=r"net\.nern: coded integers are torch.* expected bytes"):
            nernlit.load(path)
    layers = [math.prod(shape[:2]) for shape in header["specification"]["layers"].values()]
    large = torch.full((sum(layers), 2), 16, dtype=torch.int32)
    write_container(path, Contents(header, {**tensors, "predictor.codes": encode_codes(large, layers)}))
    with pytest.raises(FileFormatError, match=r"a code of the predictor is outside 0\.\.15"):
        nernlit.load(path)
    for option, value in (
        ("codebooks", 10**9),
        ("bits", 16),
        ("bits", 99),
        ("share", "planet"),
        ("kernel_size", 10**6),
    ):
        forged_header = copy.deepcopy(header)
        forged_header["specification"]["predictor"]["init_args"][option] = value
        write_container(path, Contents(forged_header, tensors))
        with pytest.raises(FileFormatError, match="cannot be built"):
            nernlit.load(path)


def test_damaged_codes_in_a_checkpoint_are_refused() -> None:
    predictor = _predictor(_digits())
    with pytest.raises(CheckpointError, match=r"the codes are torch.uint8 of shape \(3,\); expected uint8 of shape"):
        predictor.load_state_dict({**predictor.state_dict(), "_extra_state": torch.zeros(3, dtype=torch.uint8)})


def test_training_changes_codewords_and_scales_and_no_code() -> None:
    representation = _digits(scale="layer")
    predictor = _predictor(representation)
    before = {name: value.clone() for name, value in predictor.state_dict().items()}
    error = _error(representation)
    averaging = EMAWeightAveraging(decay=0.5)
    trainer = quiet_trainer(max_steps=30, callbacks=[averaging])
    trainer.fit(ReconOnly(representation, _adam, sampling=AllKernels()), _steps(30))
    after = predictor.state_dict()
    assert torch.equal(after["_extra_state"], before["_extra_state"])
    assert not torch.equal(after["codewords"], before["codewords"])
    assert not torch.equal(after["scales.values"], before["scales.values"])
    assert _error(representation) < error


def test_trials_have_random_codewords_and_the_same_codes() -> None:
    representation = _tiny(scale="filter")
    trials = PredictorEnsemble(representation.predictor, 2)
    trials.reset(0, 1)
    one, other = trials(representation.addresses)
    assert not torch.equal(one, other)
    assert torch.allclose(trials.batched(representation.addresses), torch.stack([one, other]))
    codes: list[Tensor] = [trial.state_dict()["_extra_state"] for trial in trials.each]
    assert torch.equal(codes[0], codes[1])


def test_the_seed_is_an_option_and_global_randomness_does_not_matter() -> None:
    codes = []
    for seed, state in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(state)
        codes.append(_predictor(_digits(seed=seed)).codes)
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebooks": 0}, "codebooks=0, bits=4; expected at least one codebook, and 1 to 16 bits"),
        ({"bits": 17}, "codebooks=2, bits=17; expected"),
        ({"price": -0.01}, "price=-0.01; expected"),
        ({"beam": 0}, "iterations=3, beam=0; expected at least 1 of both"),
        ({"sample": 15}, r"sample=15; expected at least the number of codewords, 2\^4 = 16"),
        ({"share": "block"}, "share='block'; expected one of network, stage, layer"),
        ({"scale": "channel"}, "scale='channel'; expected one of none, layer, filter"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _digits(**options)


def test_use_before_bind_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the Codebooks do not know their addresses; call bind\(layers\) first"):
        Codebooks(2, 4)(torch.zeros(1, 3, dtype=torch.long))


OF_CODEBOOKS = [
    "--model.representation.order=none",
    "--model.representation.predictor=Codebooks",
    "--model.representation.predictor.codebooks=5",
    "--model.representation.predictor.bits=5",
    "--model.representation.predictor.scale=filter",
    "--model.optimizer=torch.optim.Adam",
    "--model.optimizer.lr=0.0001",
]


def test_the_command_line_fits_it_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = run(["fit", *QUICK, *OF_CODEBOOKS])
    trained = fitted.model.representation.kernels()
    monkeypatch.setattr(Codebooks, "fit", None)  # a checkpoint has the codes
    tested = run(["test", *QUICK, *OF_CODEBOOKS, "--ckpt_path=last"])
    assert torch.equal(tested.model.representation.kernels(), trained)
    assert float(tested.trainer.callback_metrics["test/acc"]) > 0.5
    assert torch.equal(nernlit.load(str(tested.trainer.ckpt_path)).kernels(), trained)
    sizes = tested.model.representation.sizes()
    main(["export", "runs/digits_h96", "-o", "codes.nern"])
    shown = capsys.readouterr().out
    assert f"CR of the paper {sizes.cr_paper:.1%} (predictor parameters / predicted weights)" in shown
    assert f"CR of the file {sizes.cr_file:.1%}" in shown
    assert f"bits of codes {sizes.code_bits:,}" in re.sub(r" +", " ", shown)
