"""`Fleet`: the models that workers have announced, and the workers alive now."""

from __future__ import annotations

from collections.abc import Collection

from calotype_shared.queue.keys import together
from calotype_shared.queue.scripts import Scripted, said_clearly
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.schema.worker_info import WorkerInfo


class Fleet(Scripted):
    """Every method raises RedisUnavailable when Redis cannot be reached."""

    @said_clearly
    def announce_model(self, card: ModelCard) -> None:
        """Publish a model's card. It stays when the last worker stops, because jobs can wait for the next one."""
        self._redis.hset(self.keys.models, card.name, card.model_dump_json())

    @said_clearly
    def models(self) -> dict[str, ModelCard]:
        """Every model that a worker ever announced, by name."""
        cards: dict[str, str] = self._redis.hgetall(self.keys.models)  # type: ignore[assignment]
        return {name: ModelCard.model_validate_json(card) for name, card in sorted(cards.items())}

    @said_clearly
    def served_together(self) -> list[frozenset[str]]:
        """Every set of models that a worker ever served."""
        return [frozenset(str(names).split("+")) for names in self._redis.smembers(self.keys.together)]

    @said_clearly
    def announce_worker(self, info: WorkerInfo, *, ttl_seconds: float, cards: Collection[ModelCard] = ()) -> None:
        """Publish a live worker's report; it expires after `ttl_seconds` unless renewed.

        The cards of its models go with every report, so that a Redis that has lost them has them again in seconds.
        """
        pipeline = self._redis.pipeline()
        names = [card.name for card in cards]
        for card in cards:
            pipeline.hset(self.keys.models, card.name, card.model_dump_json())
        if names:
            pipeline.sadd(self.keys.together, together(names))
        pipeline.set(self.keys.worker(info.name), info.model_dump_json(exclude_none=True), px=int(ttl_seconds * 1000))
        pipeline.sadd(self.keys.workers, info.name)
        pipeline.execute()

    @said_clearly
    def retire_worker(self, name: str) -> None:
        pipeline = self._redis.pipeline()
        pipeline.delete(self.keys.worker(name))
        pipeline.srem(self.keys.workers, name)
        pipeline.execute()

    @said_clearly
    def workers(self) -> list[WorkerInfo]:
        """Live workers, by name."""
        names = sorted(map(str, self._redis.smembers(self.keys.workers)))
        if not names:
            return []
        reports = self._redis.mget([self.keys.worker(name) for name in names])
        gone = [name for name, report in zip(names, reports, strict=True) if report is None]
        if gone:
            self._redis.srem(self.keys.workers, *gone)
        return [WorkerInfo.model_validate_json(report) for report in reports if report is not None]
