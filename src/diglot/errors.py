"""Every error that Diglot raises on purpose.

Each class also inherits the standard exception that a caller would expect, so `except ValueError` keeps working.
Messages have three parts: what was wrong, the two values seen, and what to do.
"""


class DiglotError(Exception):
    """Base class of all of Diglot's errors."""


class VocabularyError(DiglotError, ValueError):
    """A tokenizer whose token bytes cannot be known, or two vocabularies that do not fit what was asked of them."""


class RenderingError(DiglotError, ValueError):
    """A chat template that cannot render a conversation, or renders it without its content."""


class AlignmentError(DiglotError, ValueError):
    """Two token streams that were to spell the same bytes and do not."""


class TeacherError(DiglotError, RuntimeError):
    """A teacher that cannot give what an objective needs, or whose weights and tokenizer do not belong together."""


class TeacherUnavailable(TeacherError):
    """A served teacher that did not answer within the budget of retries. What was trained so far is not lost."""


class RolloutError(DiglotError, RuntimeError):
    """An engine that does not write what it was asked for, or writes it with other weights than the student's."""


class RolloutsUnavailable(RolloutError):
    """An engine that did not answer within the budget of retries. What was trained so far is not lost."""


class ConfigError(DiglotError, ValueError):
    """An option with a value that cannot work, or options that contradict each other."""


class DataError(DiglotError, ValueError):
    """A dataset, or a row of one, that cannot be used."""


class CheckpointError(ConfigError):
    """A checkpoint that is not whole, or that belongs to another run than the one that would go on from it."""


class StoppedError(DiglotError, RuntimeError):
    """A run that was asked to stop by a signal, and did so behind a whole checkpoint. `code` is for the process."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.code)


class NonFiniteError(DiglotError, FloatingPointError):
    """A loss or a gradient that is no finite number. The optimizer was not run."""
