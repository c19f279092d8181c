"""
Every error this package raises, in one small hierarchy.

Each message says what happened, what it means for the data and what to do.
Messages carry ids, sizes and names of settings; never a value that a user
stored, never a key.
"""


class VatError(Exception):
    """Base of all errors raised by langgraph-vat."""


class ConfigurationError(VatError, ValueError):
    """A setting cannot work. Nothing was written; fix the setting."""


class InvalidInputError(VatError, ValueError):
    """An argument is not something the backends can hold. Nothing was written."""


class TypeNotAllowedError(InvalidInputError):
    """
    A value is of a type that may not be made again from what is stored.

    Whoever can write to the database could otherwise have any class called. A write
    was refused whole; of a read, nothing was changed.
    """


class UnreadableError(VatError):
    """
    A stored value cannot be made again: its bytes are damaged, or its class is another one now.

    Nothing was changed. Only this value is concerned.
    """


class UnavailableError(VatError):
    """
    A backend did not answer.

    The operation may have happened whole or not at all, never in part.
    Repeating it is safe.
    """


class SchemaError(VatError):
    """The Postgres schema is missing, older, newer or locked. Nothing was changed."""


class MigrationError(VatError):
    """
    What was copied is not what its source has.

    The source is as it was. What was copied before stays in the target; the
    copy can be begun again.
    """


class ThreadDeletedError(VatError):
    """
    A late write to a thread that was deleted meanwhile.

    The write was refused and nothing of the deleted thread came back. Start
    the conversation anew, without a parent checkpoint, to use the id again.
    """


class ConflictError(VatError):
    """
    Another run went on with this thread meanwhile, and `on_conflict` is ``raise``.

    The step was refused, nothing of it was stored. Read the thread and go on
    from its newest checkpoint.
    """


class RefusedError(VatError):
    """
    A rule of the database refuses data: a constraint, a trigger, a type.

    Nothing of the operation is in Postgres. Its name and table are told, never
    the row.
    """


class QuarantinedError(RefusedError):
    """
    Earlier steps of this thread cannot be stored in Postgres.

    They stay in the journal, other threads go on. The cause is in
    ``__cause__``.
    """


class SealError(VatError):
    """
    Sealed data could not be opened.

    It was changed, moved or truncated, it is not sealed although it must be,
    or its key is gone.

    One message for every cause, so that it tells an attacker nothing.
    """


class UnknownKeyError(SealError):
    """The keyring does not hold the key that sealed this data. Names the key id."""


class ShreddedError(SealError):
    """
    The data key of this thread, or of this root of a store, was destroyed on purpose.

    What it sealed cannot be read by anybody. Delete it to use the name again.
    """


for _error in list(vars().values()):
    if isinstance(_error, type) and issubclass(_error, VatError):
        _error.__module__ = "langgraph_vat"
del _error
