# SPDX-License-Identifier: Apache-2.0
"""What is quantized and how: plain frozen data, validated on construction, stored as JSON.

`Scheme` is the bit widths, `QuantizationConfig` is what a checkpoint says about itself (its
``quantization_config``), `RecipeConfig` is what `quantize` was asked to do.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from prefixquant.errors import UserError

FORMAT_VERSION = 1
QUANT_METHOD = "prefixquant"

_SCHEME = re.compile(r"w(\d+)a(\d+)(c?)(d?)kv(\d+)(d?)")
MODES = ("static", "dynamic")
_WEIGHT_BITS = (2, 3, 4, 8)
_ACTIVATION_BITS = (4, 8, 16)
_KV_BITS = (4, 8, 16)
PREFIX_MODES = ("verified", "paper", "bos", "none")
SOLVERS = ("rtn", "gptq", "quantease", "quantease-outlier")
# Ridge strength of `prefixquant.compensate`.
COMPENSATION = 0.3


def container_bits(bits: int, companded: bool) -> int:
    """Of the integers that stand for values of so many bits: companded levels take 8."""
    return 8 if companded else bits


@dataclass(frozen=True)
class Scheme:
    """Bit widths of weights, activations and KV cache; 16 means not quantized.

    A static scale is found once; a dynamic one is made for every token (K/V: token and head) as the
    model runs. Dynamic modes are there for comparison: they cost time, and K/V have no kernels.
    Companded 4-bit activations take sixteen levels that are not evenly spaced
    (`prefixquant.quantizer.compand`).
    """

    weight_bits: int
    activation_bits: int
    kv_bits: int
    activation_mode: str = "static"
    kv_mode: str = "static"
    companded: bool = False

    def __post_init__(self):
        for name, allowed in (
            ("weight_bits", _WEIGHT_BITS),
            ("activation_bits", _ACTIVATION_BITS),
            ("kv_bits", _KV_BITS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(
                    f"scheme: {name} expected one of {', '.join(map(str, allowed))}, got {value}"
                )
        if self.weight_bits < 4 and self.activation_bits < 16:
            raise UserError(
                f"scheme: weight_bits {self.weight_bits} needs activation_bits 16 (weight-only), "
                f"got {self.activation_bits}"
            )
        for name, bits in (
            ("activation_mode", self.activation_bits),
            ("kv_mode", self.kv_bits),
        ):
            mode = getattr(self, name)
            if mode not in MODES or (mode == "dynamic" and bits == 16):
                raise UserError(
                    f"scheme: {name} expected static, or dynamic with bits below 16, "
                    f"got {mode!r} with {bits} bits"
                )
        if type(self.companded) is not bool or (self.companded and self.activation_bits != 4):
            raise UserError(
                "scheme: companded expected true (with 4-bit activations) or false, "
                f"got {self.companded!r} with {self.activation_bits} bits"
            )
        if self.weight_bits == 8 and self.activation_bits == 4:
            raise UserError("scheme: 8-bit weights with 4-bit activations have no kernel; use w8a8")

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """``"w4a4kv4"`` -> ``Scheme(4, 4, 4)``; a d makes a part dynamic: ``"w4a4dkv4d"``; a c
        compands the activations: ``"w4a4ckv4"``."""
        match = _SCHEME.fullmatch(text.lower())
        if match is None:
            raise UserError(f"scheme: expected the form w4a4kv4, got {text!r}")
        weights, activations, companded, dynamic, kv, dynamic_kv = match.groups()
        modes = ("dynamic" if d else "static" for d in (dynamic, dynamic_kv))
        return cls(int(weights), int(activations), int(kv), *modes, bool(companded))

    def __str__(self) -> str:
        dynamic, dynamic_kv = (
            "d" if mode == "dynamic" else "" for mode in (self.activation_mode, self.kv_mode)
        )
        activations = f"a{self.activation_bits}{'c' if self.companded else ''}{dynamic}"
        return f"w{self.weight_bits}{activations}kv{self.kv_bits}{dynamic_kv}"

    @property
    def container_bits(self) -> int:
        """Of the integers that stand for activations, which the products multiply."""
        return container_bits(self.activation_bits, self.companded)


def check_weight_options(scheme: Scheme, group_size: int, outlier_fraction: float) -> None:
    """The options of weights that hold for recipes and checkpoints alike.

    Raises:
        UserError: a wrong type or range, or groups with quantized activations.
    """
    if type(group_size) is not int or group_size < 0:
        raise UserError(f"group_size: expected an integer >= 0, got {group_size!r}")
    if group_size and scheme.activation_bits < 16:
        raise UserError(
            f"group_size: groups are weight-only, expected activation_bits 16, "
            f"got {scheme.activation_bits}"
        )
    if type(outlier_fraction) not in (int, float) or not 0 <= outlier_fraction <= 0.5:
        raise UserError(
            f"outlier_fraction: expected a number from 0 to 0.5, got {outlier_fraction!r}"
        )


def _from_dict(cls: type, data: dict[str, Any], where: str):
    """Builds the dataclass ``cls`` from JSON data, rejecting unknown and missing keys."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}")
    missing = sorted(
        name
        for name, f in fields.items()
        if name not in data
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    )
    if missing:
        raise UserError(f"{where}: missing key {missing[0]!r}")
    return cls(**data)


@dataclass(frozen=True)
class Rotations:
    """Which Hadamard rotations the checkpoint's tensors contain (`prefixquant.rotate`).

    R1 and R2 are folded into the weights; R3 (q and k after RoPE), R4 (down_proj input), R5
    (o_proj input, across heads) and R6 (what a block's norms give, over the whole hidden size) are
    computed at run time. ``r4_block_size`` is the size of the R4 blocks: the intermediate size for
    a full transform; ``r5_block_size`` that of the R5 blocks: the width of all heads for a full
    one. R6 takes the place of R1: a model has one of them at most.
    """

    r1: bool = True
    r2: bool = True
    r3: bool = True
    r4: bool = True
    r4_block_size: int = 0
    r5: bool = False  # absent in checkpoints that are older than it
    r5_block_size: int = 0
    r6: bool = False  # absent in checkpoints that are older than it

    def __post_init__(self):
        for name in ("r1", "r2", "r3", "r4", "r5", "r6"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"rotations: {name} expected true or false")
        if self.r1 and self.r6:
            raise UserError("rotations: r6 takes the place of r1, expected one of them at most")
        for name in ("r4_block_size", "r5_block_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise UserError(f"rotations: {name} expected an integer >= 0")

    @property
    def r4_size(self) -> int:
        """Of the R4 blocks; 1 is none."""
        return self.r4_block_size if self.r4 else 1

    @property
    def r5_size(self) -> int:
        """Of the R5 blocks; 1 is none."""
        return self.r5_block_size if self.r5 else 1

    def r6_size(self, hidden: int) -> int:
        """Of the R6 transform in a model of that hidden size; 1 is none."""
        return hidden if self.r6 else 1


@dataclass(frozen=True)
class QuantizationConfig:
    """A checkpoint's ``quantization_config``; docs/checkpoint-format.md describes every key."""

    weight_bits: int
    activation_bits: int
    kv_bits: int
    rotations: Rotations
    prefix_token_ids: tuple[int, ...]
    prefix_text: tuple[str, ...]
    prefix_mode: str
    solver: str
    producer: str
    group_size: int = 0  # columns that share a weight scale; 0: one scale an output channel
    outlier_fraction: float = 0.0  # of the entries of each weight, kept in 16 bits beside it
    activation_mode: str = "static"
    kv_mode: str = "static"
    centred: bool = False  # shifts beside the scales, and a bias for every linear
    centred_keys: bool = False  # a shift beside the scales of K
    companded: bool = False  # the levels of 4-bit activations
    quant_method: str = QUANT_METHOD
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        if self.quant_method != QUANT_METHOD:
            raise UserError(
                f"quantization_config: quant_method expected {QUANT_METHOD!r}, "
                f"got {self.quant_method!r}"
            )
        if self.format_version != FORMAT_VERSION:
            raise UserError(
                f"quantization_config: format_version expected {FORMAT_VERSION}, "
                f"got {self.format_version!r}"
            )
        check_weight_options(self.scheme, self.group_size, self.outlier_fraction)
        if type(self.centred) is not bool or (self.centred and self.activation_bits == 16):
            raise UserError(
                "quantization_config: centred expected true (with quantized activations) or false, "
                f"got {self.centred!r} with {self.activation_bits} bits"
            )
        if type(self.centred_keys) is not bool or (self.centred_keys and self.kv_bits == 16):
            raise UserError(
                "quantization_config: centred_keys expected true (with a quantized cache) or "
                f"false, got {self.centred_keys!r} with {self.kv_bits} bits"
            )
        if any(type(t) is not int or t < 0 for t in self.prefix_token_ids):
            raise UserError("quantization_config: prefix_token_ids expected integers >= 0")
        if len(self.prefix_text) != len(self.prefix_token_ids):
            raise UserError(
                "quantization_config: prefix_text expected one text per prefix token, "
                f"got {len(self.prefix_text)} for {len(self.prefix_token_ids)}"
            )

    @property
    def scheme(self) -> Scheme:
        return Scheme(
            self.weight_bits,
            self.activation_bits,
            self.kv_bits,
            self.activation_mode,
            self.kv_mode,
            self.companded,
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "QuantizationConfig":
        if not isinstance(data, dict):
            raise UserError("quantization_config: expected an object")
        data = dict(data)
        if data.get("quant_method") != QUANT_METHOD:
            raise UserError(
                f"quantization_config: quant_method expected {QUANT_METHOD!r}, "
                f"got {data.get('quant_method')!r}"
            )
        # The version comes first: a later format may have other keys, and that is the thing to say.
        if data.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"quantization_config: format_version expected {FORMAT_VERSION}, "
                f"got {data.get('format_version')!r}"
            )
        rotations = data.get("rotations")
        if not isinstance(rotations, dict):
            raise UserError("quantization_config: rotations expected an object")
        data["rotations"] = _from_dict(Rotations, rotations, "rotations")
        for key in ("prefix_token_ids", "prefix_text"):
            if not isinstance(data.get(key), list | tuple):
                raise UserError(f"quantization_config: {key} expected a list")
            data[key] = tuple(data[key])
        return _from_dict(cls, data, "quantization_config")


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning after calibration (EfficientQAT's two phases); 0 epochs leave a phase out.

    Rates are relative: of a scale, the share of it that a step moves it by; of a weight, the part
    of its channel's range (`prefixquant.finetune.learned`).
    """

    epochs: int = 0  # Block-AP
    e2e_epochs: int = 0
    samples: int = 128
    seqlen: int = 1024
    batch: int = 4
    validation_samples: int = 8  # of ``samples``, held out
    patience: int = 4  # epochs without gain on them before a training stops
    weight_rate: float = 1e-3
    scale_rate: float = 2e-3
    e2e_weights: bool = True  # train the weights end to end too; False: scales alone (E2E-QP)
    e2e_weight_rate: float = 1e-4
    e2e_scale_rate: float = 5e-4
    e2e_norms: bool = False
    e2e_prefix: bool = False
    e2e_prefix_rate: float = 1e-3  # of the rms of the prefix's K or V in a block
    e2e_mix: bool = False  # string the samples together anew every epoch, and cut them elsewhere
    e2e_generated: int = 0  # samples that the float model writes: half of every epoch's; mixes
    e2e_average: float = 0.0  # decay of the running mean that is validated and kept; 0: none
    checkpointing: bool = False  # end to end: compute activations twice, keep one block's
    activations: str = "auto"  # where the streams are kept: device, host or disk
    folder: str | None = None  # of the streams on disk; None: the system's temporary folder
    graphs: bool = True  # on a GPU, run a training step as one CUDA graph

    def __post_init__(self):
        for name in ("epochs", "e2e_epochs", "e2e_generated"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("batch", "validation_samples", "patience"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.seqlen < 2:
            raise UserError(f"seqlen of fine-tuning: expected at least 2, got {self.seqlen}")
        if self.samples <= self.validation_samples:
            raise UserError(
                f"train_samples: expected more than the {self.validation_samples} held out for "
                f"validation, got {self.samples}"
            )
        for rate in dataclasses.fields(self):
            value = getattr(self, rate.name)
            shares = rate.name.endswith("_rate") or rate.name == "e2e_average"
            if shares and not 0 <= value < 1:
                raise UserError(f"{rate.name}: expected 0 to 1, got {value}")
        if self.activations not in ("auto", "device", "host", "disk"):
            raise UserError(
                f"activations: expected auto, device, host or disk, got {self.activations!r}"
            )

    @property
    def active(self) -> bool:
        return self.epochs > 0 or self.e2e_epochs > 0


@dataclass(frozen=True)
class RecipeConfig:
    """What `prefixquant.quantize` is asked to do. The defaults are design values of the paper
    (PrefixQuant, section 5 and appendix): 64 x 512 tokens for the outlier scan and the maxima."""

    scheme: Scheme = field(default_factory=lambda: Scheme(4, 4, 4))
    solver: str = "gptq"
    group_size: int = 0  # columns that share a weight scale; 0: one scale an output channel
    outlier_fraction: float = 0.01  # of each weight, kept in 16 bits; quantease-outlier only
    compensation: float = COMPENSATION  # 0: the solvers aim at the float weights
    prefix: str = "verified"  # a mode of PREFIX_MODES, or "text:..." for the user's own tokens
    eta: float = 64.0  # a token is an outlier where its abs-max exceeds eta times the median
    nsamples: int = 64
    seqlen: int = 512
    search_samples: int = 32
    search_seqlen: int = 1024
    r4_block_size: int = 0  # 0: the whole intermediate size
    r5_block_size: int = 0  # of 4-bit activations; 0: all heads in one block, 1: no R5
    r6: bool = True  # with 4-bit activations: R6 in place of R1
    rotate: bool = True
    balance: bool = True  # even out channels before they are rotated (`prefixquant.balance`)
    centre: bool = True  # take means out of activations, K and V (`prefixquant.centre`)
    seed: int = 0
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    def __post_init__(self):
        if self.solver not in SOLVERS:
            raise UserError(f"solver: expected one of {', '.join(SOLVERS)}, got {self.solver!r}")
        check_weight_options(self.scheme, self.group_size, self.outlier_fraction)
        if self.prefix not in PREFIX_MODES and not self.prefix.startswith("text:"):
            raise UserError(
                f"prefix: expected one of {', '.join(PREFIX_MODES)} or text:..., "
                f"got {self.prefix!r}"
            )
        if not self.eta > 1:
            raise UserError(f"eta: expected a number above 1, got {self.eta}")
        if not 0 <= self.compensation < math.inf:
            raise UserError(f"compensation: expected a number >= 0, got {self.compensation}")
        for name in ("nsamples", "seqlen", "search_samples", "search_seqlen"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("r4_block_size", "r5_block_size"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: expected >= 0, got {getattr(self, name)}")
        if self.finetune.active and (self.group_size or self.stored_outlier_fraction):
            raise UserError(
                "epochs: fine-tuning trains one scale an output channel and no outliers, "
                f"got solver {self.solver!r} with group_size {self.group_size}"
            )

    @property
    def rotation_options(self) -> dict[str, Any]:
        """The arguments of `rotate.plan_rotations`. R5 and R6 are work at run time, for an error
        that activations of more than 4 bits do not have."""
        four_bit = self.scheme.activation_bits == 4
        return {
            "rotate": self.rotate,
            "r4_block_size": self.r4_block_size,
            "r5_block_size": self.r5_block_size if four_bit else 1,
            "r6": self.r6 and four_bit,
            "seed": self.seed,
        }

    @property
    def centred(self) -> bool:
        """Whether means are taken out: only quantized activations gain by it."""
        return self.centre and self.scheme.activation_bits < 16

    @property
    def centred_keys(self) -> bool:
        """Whether the mean of the keys is taken out of the cache too."""
        return self.centred and self.scheme.kv_bits < 16

    @property
    def stored_outlier_fraction(self) -> float:
        """That of the checkpoint: only one solver leaves outliers."""
        return self.outlier_fraction if self.solver == "quantease-outlier" else 0.0
