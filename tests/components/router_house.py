"""What the tests of the router share."""

import asyncio

import httpx


def client(url):
    return httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=None), timeout=60)


async def until(condition, seconds=10):
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.005)
