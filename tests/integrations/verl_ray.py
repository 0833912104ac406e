"""A Ray of one process, for verl's trainers: an actor is an object with a thread, and a call waits for its result.

What the trainers do with actors, their groups and their results is their own code; only where the actors live is not
Ray's.
"""

import asyncio
import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from inspect import isawaitable, isclass
from types import SimpleNamespace
from typing import Any

import cloudpickle

ACTORS: list["ActorHandle"] = []


class ObjectRef:
    """The result of a call, which has ended; it can be awaited too."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Generator:
        return self.value
        yield


def copied(value: Any) -> Any:
    """What arrives where something is sent: a copy."""
    return cloudpickle.loads(cloudpickle.dumps(value))


class Call:
    """``.remote(...)`` of a function; references among the arguments are what they refer to."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def options(self, **_: Any) -> "Call":
        return self

    def remote(self, *args: Any, **kwargs: Any) -> ObjectRef:
        return ObjectRef(self.function(*map(get, args), **{name: get(value) for name, value in kwargs.items()}))


class ActorHandle:
    """An actor: made in its thread, which has an event loop, and each of its methods has a ``.remote``."""

    def __init__(self, made: type, args: tuple, kwargs: dict) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = ThreadPoolExecutor(1, initializer=asyncio.set_event_loop, initargs=(self._loop,))
        self._number = len(ACTORS)
        ACTORS.append(self)
        args, kwargs = copied((args, kwargs))
        self._instance = self._thread.submit(made, *args, **kwargs).result()

    def _run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = copied((args, kwargs))

        async def awaited(value: Any) -> Any:
            found = await value
            if tasks := asyncio.all_tasks() - {asyncio.current_task()}:  # left running; the next call may be theirs
                await asyncio.wait(tasks)
            return found

        def body() -> Any:
            value = function(*args, **kwargs)
            return self._loop.run_until_complete(awaited(value)) if isawaitable(value) else value

        return copied(self._thread.submit(body).result())

    def __reduce__(self) -> tuple:
        return actor, (self._number,)

    def __getattr__(self, name: str) -> Call:
        if name.startswith("__"):
            raise AttributeError(name)
        return Call(lambda *args, **kwargs: self._run(getattr(self._instance, name), *args, **kwargs))


def actor(number: int) -> ActorHandle:
    """A handle that was sent is the same actor's."""
    return ACTORS[number]


class ActorClass:
    """A class whose ``.remote(...)`` makes an actor; the environment variables of its options are set for good."""

    def __init__(self, made: type, options: dict | None = None) -> None:
        self.__ray_actor_class__, self.given = made, options or {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["__ray_actor_class__"], name)

    def __dir__(self) -> list[str]:
        return dir(self.__ray_actor_class__)

    def options(self, **options: Any) -> "ActorClass":
        return ActorClass(self.__ray_actor_class__, options)

    def remote(self, *args: Any, **kwargs: Any) -> ActorHandle:
        os.environ.update(self.given.get("runtime_env", {}).get("env_vars", {}))
        return ActorHandle(self.__ray_actor_class__, args, kwargs)


class PlacementGroup:
    id = "group"

    def __init__(self, bundles: list, **_: Any) -> None:
        self.bundle_count = len(bundles)

    def ready(self) -> ObjectRef:
        return ObjectRef(True)


def get(value: Any) -> Any:
    if isinstance(value, list):
        return [get(v) for v in value]
    return value.value if isinstance(value, ObjectRef) else value


def remote(*given: Any, **_: Any) -> Any:
    if not given:
        return remote
    return ActorClass(given[0]) if isclass(given[0]) else Call(given[0])


def modules() -> dict[str, dict[str, Any]]:
    """The names that verl looks for, by module."""
    address, node = "127.0.0.1", "node"
    nodes = [{"NodeID": node, "NodeManagerAddress": address, "Alive": True, "Resources": {"CPU": 1.0}}]
    state = SimpleNamespace(placement_group_table=lambda _: {"bundles_to_node_id": {0: node}})
    strategies = ("NodeAffinitySchedulingStrategy", "PlacementGroupSchedulingStrategy")
    return {
        "ray": {
            "get": get,
            "put": ObjectRef,
            "remote": remote,
            "nodes": lambda: nodes,
            "ObjectRef": ObjectRef,
            "is_initialized": lambda: False,
        },
        "ray.actor": {"ActorHandle": ActorHandle, "ActorClass": ActorClass},
        "ray.util": {"get_node_ip_address": lambda: address, "list_named_actors": list},
        "ray.util.placement_group": {"PlacementGroup": PlacementGroup, "placement_group": PlacementGroup},
        "ray.util.scheduling_strategies": {name: lambda **_: None for name in strategies},
        "ray.experimental": {},
        "ray.experimental.state": {},
        "ray.experimental.state.api": {"get_actor": lambda _: None},
        "ray._private": {},
        "ray._private.runtime_env": {},
        "ray._private.runtime_env.constants": {"RAY_JOB_CONFIG_JSON_ENV_VAR": "RAY_JOB_CONFIG_JSON_ENV_VAR"},
        "ray._private.state": {"available_resources_per_node": lambda: {node: {"GPU": 1}}, "state": state},
    }
