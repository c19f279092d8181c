"""Checkpointer and store for LangGraph: hot, durable, remembered, sealed."""

from langgraph_vat._seal.legacy import LegacySerializer
from langgraph_vat._seal.strict import StrictSerializer
from langgraph_vat.errors import (
    ConfigurationError,
    ConflictError,
    InvalidInputError,
    MigrationError,
    QuarantinedError,
    RefusedError,
    SchemaError,
    SealError,
    ShreddedError,
    ThreadDeletedError,
    TypeNotAllowedError,
    UnavailableError,
    UnknownKeyError,
    UnreadableError,
    VatError,
)
from langgraph_vat.keyring import Keyring, KeyWrapper
from langgraph_vat.saver import HybridSaver
from langgraph_vat.serde import EncryptedSerializer
from langgraph_vat.settings import Retention, Settings
from langgraph_vat.store import SemanticStore
from langgraph_vat.vat import Vat

__all__ = [
    "ConfigurationError",
    "ConflictError",
    "EncryptedSerializer",
    "HybridSaver",
    "InvalidInputError",
    "KeyWrapper",
    "Keyring",
    "LegacySerializer",
    "MigrationError",
    "QuarantinedError",
    "RefusedError",
    "Retention",
    "SchemaError",
    "SealError",
    "SemanticStore",
    "Settings",
    "ShreddedError",
    "StrictSerializer",
    "ThreadDeletedError",
    "TypeNotAllowedError",
    "UnavailableError",
    "UnknownKeyError",
    "UnreadableError",
    "Vat",
    "VatError",
]
