"""Threads as a whole: which there are, for how long they are kept, and that a tenant's go."""

from collections.abc import Mapping, Sequence
from typing import Any

from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_vat._io.driver import drive
from langgraph_vat._io.protocols import Backend
from langgraph_vat._lifecycle import Lifecycle
from langgraph_vat._ops import reseal, retention, rewrite, rotate, seal_existing, sweep
from langgraph_vat._ops import search_threads as searching
from langgraph_vat._ops.address import View
from langgraph_vat._records import Resealed, Rewritten, Rotated, Sealed, Swept, ThreadInfo
from langgraph_vat.errors import ConfigurationError, InvalidInputError
from langgraph_vat.settings import STORAGES, Retention


class Threads:
    """
    What a saver tells of its threads, and does with many of them.

    It is had from `HybridSaver.threads`, and sees what that saver, or view of
    a tenant, may touch.
    """

    def __init__(self, life: Lifecycle, view: View, serde: SerializerProtocol) -> None:
        self._life = life
        self._view = view
        self._serde = serde

    @property
    def _everything(self) -> str:
        """What the ids of a tenant's threads begin with; or those of all threads, of any tenant."""
        return self._view.prefix if self._view.is_scoped else ""

    def search(
        self,
        *,
        metadata: Mapping[str, Any] | None = None,
        before: ThreadInfo | None = None,
        limit: int = 20,
    ) -> Sequence[ThreadInfo]:
        """
        Return threads, those with the newest steps first, without reading checkpoints.

        Threads that only another saver has written so far are not among them;
        they are once they were read.

        Args:
            metadata: What their metadata must contain; of the keys that
                `Settings.thread_metadata` names.
            before: The last thread of the page before: threads after it.
            limit: Most threads to return.

        Raises:
            InvalidInputError: An argument cannot be searched for.
            UnavailableError: Postgres does not answer.
        """
        return drive(self._search(self._life.blocking(), metadata, before, limit))

    async def asearch(
        self,
        *,
        metadata: Mapping[str, Any] | None = None,
        before: ThreadInfo | None = None,
        limit: int = 20,
    ) -> Sequence[ThreadInfo]:
        """Like `search`."""
        return await self._search(await self._life.asyncio(), metadata, before, limit)

    async def _search(
        self,
        backend: Backend,
        metadata: Mapping[str, Any] | None,
        before: ThreadInfo | None,
        limit: int,
    ) -> Sequence[ThreadInfo]:
        if not isinstance(before, ThreadInfo | None):
            raise InvalidInputError("before must be a thread that search() returned")
        if before is not None:
            before = before._replace(thread_id=self._view.stored(before.thread_id))
        found = await searching.search_threads(
            self._life.shared, backend, self._view.tenant, metadata or {}, before, limit
        )
        return [one._replace(thread_id=self._view.shown(one.thread_id)) for one in found]

    def retain(self, thread_id: str, policy: Retention | None) -> None:
        """
        Give a thread a policy of its own, which stands for the saver's.

        Args:
            thread_id: The thread.
            policy: ``Retention()`` keeps it for ever; None takes its own away.

        Raises:
            InvalidInputError: There is no such thread.
        """
        drive(self._retain(self._life.blocking(), thread_id, policy))

    async def aretain(self, thread_id: str, policy: Retention | None) -> None:
        """Like `retain`."""
        await self._retain(await self._life.asyncio(), thread_id, policy)

    async def _retain(self, backend: Backend, thread_id: str, policy: Retention | None) -> None:
        stored = self._view.stored(thread_id)
        self._check(policy)
        await retention.retain(self._life.shared, backend, stored, sweep.to_json(policy))

    def _check(self, policy: Retention | None) -> None:
        keys = self._life.shared.settings.thread_metadata
        if not isinstance(policy, Retention | None):
            raise InvalidInputError("a policy must be a Retention; see Retention.of for mappings")
        if policy is not None and not policy.metadata.keys() <= {*keys}:
            raise InvalidInputError(
                "the policy's metadata must be among thread_metadata; nothing was changed"
            )

    def sweep(self, policy: Retention | None = None, *, dry_run: bool = False) -> Swept:
        """
        Delete or prune the threads that have expired, one by one.

        A thread that is used meanwhile is left alone. It may be stopped at any
        moment, and run in many processes. From a saver, not a tenant's view of
        it, it sweeps the threads of all tenants, too.

        Args:
            policy: For threads without their own; None for the saver's.
            dry_run: Whether to tell only what would go.

        Returns:
            How many threads, checkpoints and bytes went, or would.
        """
        return drive(self._sweep(self._life.blocking(), policy, is_dry=dry_run))

    async def asweep(self, policy: Retention | None = None, *, dry_run: bool = False) -> Swept:
        """Like `sweep`."""
        return await self._sweep(await self._life.asyncio(), policy, is_dry=dry_run)

    async def _sweep(self, backend: Backend, policy: Retention | None, *, is_dry: bool) -> Swept:
        shared = self._life.shared
        self._check(policy)
        return await sweep.sweep(
            shared,
            backend,
            policy or shared.settings.retention,
            prefix=self._everything,
            is_dry=is_dry,
        )

    def rewrite(self, storage: str) -> Rewritten:
        """
        Store what is there in another form, thread by thread, while all goes on.

        It may be stopped at any moment; run again, it goes on. Before the way back
        to PostgresSaver, give every saver ``storage="compatible"``.

        Args:
            storage: ``compact``, or ``compatible`` with PostgresSaver.

        Raises:
            InvalidInputError: There is no such form.
        """
        return drive(self._rewrite(self._life.blocking(), storage))

    async def arewrite(self, storage: str) -> Rewritten:
        """Like `rewrite`."""
        return await self._rewrite(await self._life.asyncio(), storage)

    async def _rewrite(self, backend: Backend, storage: str) -> Rewritten:
        if storage not in STORAGES:
            raise InvalidInputError(f"storage must be one of {STORAGES}; nothing was rewritten")
        return await rewrite.rewrite(
            self._life.shared,
            backend,
            prefix=self._everything,
            is_compact=storage == "compact",
        )

    def rotate(self) -> Rotated:
        """
        Wrap the data keys of threads by the keyring's primary key, while all goes on.

        Values stay as they are. It may be stopped at any moment; run again, it
        goes on. If every process wraps by that key already, and none is `left`,
        the others open nothing here any more: a process that still runs with the old one in
        front wraps new threads by it, so call this again when the last has ended. Backups,
        archives and what an `EncryptedSerializer` sealed for another saver may still need it.

        Raises:
            ConfigurationError: There is no keyring.
        """
        return drive(self._rotate(self._life.blocking()))

    async def arotate(self) -> Rotated:
        """Like `rotate`."""
        return await self._rotate(await self._life.asyncio())

    async def _rotate(self, backend: Backend) -> Rotated:
        keyring = self._life.shared.keyring
        if keyring is None:
            raise ConfigurationError("there is no keyring to rotate to; pass keyring=")
        return await rotate.rotate_threads(backend.durable, keyring, self._everything)

    def reseal(self, *, max_age_s: float = 0.0) -> Resealed:
        """
        Seal values anew, under new data keys, while all goes on.

        A data key that was replaced still opens what comes late; when nothing needs it, and a
        day has passed, the next call drops it. It may be stopped at any moment; run again, it
        goes on. Called every day with a `max_age_s` of 90 days, no data key gets older than that.
        What is sealed anew gets what `Settings.filterable_metadata` needs.

        Args:
            max_age_s: Which data keys are replaced: those made so many seconds ago, or more.

        Raises:
            ConfigurationError: There is no keyring.
            InvalidInputError: `max_age_s` is no time.
        """
        return drive(self._reseal(self._life.blocking(), max_age_s))

    async def areseal(self, *, max_age_s: float = 0.0) -> Resealed:
        """Like `reseal`."""
        return await self._reseal(await self._life.asyncio(), max_age_s)

    async def _reseal(self, backend: Backend, max_age_s: float) -> Resealed:
        shared = self._life.shared
        reseal.check_age(shared.keyring, max_age_s)
        prefix = self._everything
        return await reseal.reseal(shared, backend, self._serde, prefix=prefix, max_age_s=max_age_s)

    def seal_existing(self) -> Sealed:
        """
        Seal the threads that were written without a keyring, while all goes on.

        Every process must have the keyring and `Settings.accept_plaintext` before, and no other
        saver write any more. A thread is sealed whole, in one transaction, for which its steps
        wait: about a second for ten thousand values. It may be stopped at any moment; run again,
        it goes on. When none is `left`, leave `accept_plaintext` out, everywhere. Backups, the
        WAL and an append-only file from before still have what was in the clear.

        Raises:
            ConfigurationError: There is no keyring, or the time of `accept_plaintext` has come.
            UnavailableError: A tier does not answer. What was sealed is.
        """
        return drive(self._seal_existing(self._life.blocking()))

    async def aseal_existing(self) -> Sealed:
        """Like `seal_existing`."""
        return await self._seal_existing(await self._life.asyncio())

    async def _seal_existing(self, backend: Backend) -> Sealed:
        shared = self._life.shared
        seal_existing.check_window(shared.keyring, shared.settings)
        prefix = self._everything
        return await seal_existing.seal_existing(shared, backend, self._serde, prefix=prefix)

    def shred(self, thread_id: str) -> None:
        """
        Destroy the data key of a thread: nobody can read what it holds any more.

        Its rows stay, here and on replicas, and reading or continuing it raises
        `ShreddedError`; a list of all threads passes over it. Delete it to use the id again.
        A backup from before has the wrapped key: it opens for as long as somebody has the key of
        the keyring that wrapped it. Rotate, and destroy that one, to end it there, too.

        Raises:
            InvalidInputError: There is no such thread, or it is not sealed.
        """
        drive(self._shred(self._life.blocking(), thread_id))

    async def ashred(self, thread_id: str) -> None:
        """Like `shred`."""
        await self._shred(await self._life.asyncio(), thread_id)

    async def _shred(self, backend: Backend, thread_id: str) -> None:
        await reseal.shred(self._life.shared, backend, self._view.stored(thread_id))

    def shred_all(self) -> int:
        """
        Shred all sealed threads of a tenant; return how many there were. See `shred`.

        Stopped, it can be run again. Threads that others make meanwhile may stay.

        Raises:
            InvalidInputError: This is not a tenant's view; see `HybridSaver.scoped`.
        """
        return drive(self._shred_all(self._life.blocking()))

    async def ashred_all(self) -> int:
        """Like `shred_all`."""
        return await self._shred_all(await self._life.asyncio())

    async def _shred_all(self, backend: Backend) -> int:
        self._refuse_unscoped()
        return await reseal.shred_all(self._life.shared, backend, self._everything)

    def delete_all(self) -> int:
        """
        Delete all threads of a tenant; return how many there were.

        Stopped, it can be run again. Threads that others make meanwhile may stay.

        Raises:
            InvalidInputError: This is not a tenant's view; see `HybridSaver.scoped`.
        """
        return drive(self._delete_all(self._life.blocking()))

    async def adelete_all(self) -> int:
        """Like `delete_all`."""
        return await self._delete_all(await self._life.asyncio())

    def _refuse_unscoped(self) -> None:
        if not self._view.is_scoped:
            raise InvalidInputError(
                "only a tenant's threads can be deleted or shredded all at once: use"
                " scoped(tenant).threads. Nothing was changed."
            )

    async def _delete_all(self, backend: Backend) -> int:
        self._refuse_unscoped()
        return await retention.delete_tenant(self._life.shared, backend, self._view.tenant)
