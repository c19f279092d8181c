"""What `with` and `async with` mean for everything that connects: set up, then close."""

from types import TracebackType
from typing import Self


class Managed:
    """Calls `setup` on entering and `close` on leaving, or their async twins."""

    def setup(self) -> None:
        """Create or migrate what is needed."""
        raise NotImplementedError

    async def asetup(self) -> None:
        """Like `setup`."""
        raise NotImplementedError

    def close(self) -> None:
        """Close. May be called again."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """Like `close`."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self.setup()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        try:
            await self.asetup()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
