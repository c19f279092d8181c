"""
The connections of a tenant's view: those of its store, and each transaction says whose it is.

Policies of Postgres may ask for that. It is said for a transaction and never for a connection,
which the next one to use it has for another tenant.
"""

from collections.abc import Awaitable, Callable
from typing import LiteralString, TypeVar

from langgraph_vat._io.connections import Connections, Tables
from langgraph_vat._io.protocols import Backend, Durable, Params, Query, Row, Session

T = TypeVar("T")
SAY_TENANT: LiteralString = "SELECT set_config('langgraph_vat.tenant', %(tenant)s, true)"


class TenantDurable:
    """Postgres, in transactions of a tenant."""

    def __init__(self, durable: Durable, tenant: str) -> None:
        self._durable = durable
        self._tenant = tenant

    async def transact(self, body: Callable[[Session], Awaitable[T]]) -> T:
        async def said(session: Session) -> T:
            await session.execute(SAY_TENANT, {"tenant": self._tenant})
            return await body(session)

        return await self._durable.transact(said)

    async def fetch(
        self, query: Query, params: Params = None, *, plan_anew: bool = False
    ) -> list[Row]:
        return await self.transact(lambda s: s.fetch(query, params, plan_anew=plan_anew))


class TenantBackend:
    """The tiers for a tenant."""

    def __init__(self, backend: Backend, tenant: str) -> None:
        self.durable = TenantDurable(backend.durable, tenant)
        self.hot = backend.hot
        self.cache = backend.cache
        self.sleep = backend.sleep
        self.run = backend.run
        self.embed = backend.embed


class TenantConnections:
    """`Connections` for a tenant, who closes none: others use the same."""

    def __init__(self, connections: Connections, tenant: str) -> None:
        self._connections = connections
        self._tenant = tenant
        self.schema = connections.schema

    def blocking(self, needs: Tables = frozenset()) -> TenantBackend:
        """The backend for blocking callers."""
        return TenantBackend(self._connections.blocking(needs), self._tenant)

    async def asyncio(self, needs: Tables = frozenset()) -> TenantBackend:
        """The backend of the running event loop."""
        return TenantBackend(await self._connections.asyncio(needs), self._tenant)
