# SPDX-License-Identifier: Apache-2.0
"""`prefixquant quantize` and `eval` as function calls.

    python examples/quantize_from_python.py path/to/model model-w4a8kv4 [text.txt]

A short calibration, so that it takes a minute on a small model; leave out the sizes for the
defaults, which are those of the paper.
"""

import sys
from pathlib import Path

from prefixquant import progress, text
from prefixquant.config import RecipeConfig, Scheme
from prefixquant.loading import load_float_model
from prefixquant.report import describe_evaluation
from prefixquant.workflow import (
    Origin,
    Protocol,
    block_state,
    calibration_tokens,
    evaluate,
    quantize_and_save,
)


def main(model: str, output: str, calibration: str = "pydoc") -> None:
    bar = progress.for_stream()
    float_model, tokenizer = load_float_model(model)
    content = text.load_text(calibration)
    tokens = calibration_tokens(content, tokenizer)
    recipe = RecipeConfig(
        scheme=Scheme.parse("w4a8kv4"),
        nsamples=4,
        seqlen=64,
        search_samples=2,
        search_seqlen=64,
    )
    out = Path(output)
    # Finished blocks are kept beside the output: a second run with resume=True goes on.
    state = block_state(float_model, recipe, tokens, out, resume=False, overwrite=True)
    quantize_and_save(
        float_model,
        tokenizer,
        recipe,
        tokens,
        out,
        origin=Origin(model, calibration),
        overwrite=True,
        state=state,
        progress=bar,
    )
    protocol = Protocol(calibration, windows=2, seqlen=64)
    result = evaluate(out, content, protocol, reference=model, progress=bar)
    sys.stdout.write(describe_evaluation({"evaluation": result}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
