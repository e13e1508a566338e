"""The few error types of the project: each says what was expected, what was found, where, and what to do next."""


class ForgetlessError(Exception):
    """A mistake or a missing thing that the user can mend. The message is shown as it is, without a traceback."""

    exit_code = 1


class ConfigError(ForgetlessError):
    """The recipe, an override or the command line is wrong; `problems` holds every problem found, one sentence each."""

    exit_code = 2

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(self.problems))


class DataError(ForgetlessError):
    """The training data cannot be read, or a critical expectation failed."""

    exit_code = 3


class ModelError(ForgetlessError):
    """A base model or adapter is absent, gated, damaged or of an unsupported kind."""

    exit_code = 2


class StoreError(ForgetlessError):
    """The artifact store cannot be read or written: the place named for it is wrong, full or closed."""

    exit_code = 2


class ComparisonError(ForgetlessError):
    """Two score sheets are not about the same items, prompts or settings."""


class ExportError(ForgetlessError):
    """Merging, converting or registering the model failed."""


class PrunedError(ForgetlessError):
    """A trial of a sweep was stopped, as its training fell behind the others'."""


class ConflictError(ForgetlessError):
    """Another was faster at what only one can do. Nothing was changed."""


def one_line(error: Exception) -> str:
    """Return what an error says in one line, of a pydantic one which field is wrong and why."""
    from pydantic import ValidationError  # here, as the command line's help needs the other types alone

    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'][0].lower()}{e['msg'][1:]}" for e in error.errors())
    return " ".join(str(error).split())


def describe_os_error(error: OSError, what: str) -> str:
    """Return one sentence for an operating-system error met while doing `what`."""
    import errno

    hints = {
        errno.ENOSPC: "the disk is full. Free some space, or choose another place with --store",
        errno.EDQUOT: "the disk quota is used up. Free some space, or choose another place with --store",
        errno.EACCES: "permission was denied. Make the folder writable, or choose another place with --store",
        errno.EROFS: "the file system is read-only. Choose another place with --store",
        errno.ENOTDIR: "a part of that path is a file, not a folder. Choose another place with --store",
        errno.ENOENT: "there is no such file or folder",
    }
    where = f" ({error.filename})" if error.filename else ""
    return f"Could not {what}: {hints.get(error.errno or 0, error.strerror or str(error))}{where}."
