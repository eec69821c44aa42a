# SPDX-License-Identifier: Apache-2.0
"""The errors that are the user's to mend: the command line prints one line and exits with 2."""


class UserError(ValueError):
    """Wrong input: a missing file, an unsupported model, a bad flag, a damaged checkpoint.

    The message is cut at 600 characters: it quotes what was found, and a hostile file may hold
    anything.
    """

    def __init__(self, message: object = ""):
        text = str(message)
        super().__init__(text if len(text) <= 600 else f"{text[:597]}...")


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file or tensor, what was expected and
    what was found."""


class UnsupportedModelError(UserError):
    """A model whose architecture or sizes this package cannot quantize."""


class OutOfMemoryError(UserError):
    """A device has too little memory for what was asked."""
