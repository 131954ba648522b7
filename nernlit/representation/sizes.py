"""How large a representation is."""

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Sizes:
    """The sizes of a representation and its original. Weights with several names count once.

    Attributes:
        predictor_params: Number of the predictor's parameters.
        code_bits: Bits of the predictor's codes, integers that are no parameters; 0 for an MLP.
        predicted_weights: Number of weights that it predicts.
        file_bytes: Bytes of the .nern file, exactly as `Representation.save` writes it with the same options.
        original_bytes: Bytes of the original's weights as a safetensors file without metadata.
    """

    predictor_params: int
    code_bits: int
    predicted_weights: int
    file_bytes: int
    original_bytes: int

    @property
    def cr_paper(self) -> float:
        """The paper's compression ratio: predictor parameters / predicted weights.

        It compares predictors that consist of parameters alone, such as MLPs. It does not count the codes of
        `Codebooks`; `cr_file` counts everything.
        """
        return self.predictor_params / self.predicted_weights

    @property
    def cr_file(self) -> float:
        """The compression ratio of the file: bytes of the .nern file / bytes of the original's safetensors file."""
        return self.file_bytes / self.original_bytes
