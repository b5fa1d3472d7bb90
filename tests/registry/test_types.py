"""Column types that mean the same on both engines."""

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError, StatementError

from service.registry.database import Registry
from service.registry.tables import Model, Schedule, ScheduleAlias, ScheduleStatus

pytestmark = pytest.mark.both_engines


def add_schedule(registry: Registry, model_id: str, guidance_scale: Decimal | float, version: int = 1) -> str:
    with registry.write() as session:
        schedule = Schedule(
            model_id=model_id,
            sampler="ddim",
            num_steps=1,
            guidance_type="classifier-free",
            guidance_scale=guidance_scale,
            eta=Decimal(0),
            version=version,
            status=ScheduleStatus.ACCEPTED,
            score=0.5,
            timesteps=[1.0, 0.0],
            t_ratios=[1.0],
            provenance={},
        )
        session.add(schedule)
    return schedule.id


@pytest.mark.parametrize("scale", ["0", "0.1", "2.675", "999.999999", "1000"])
def test_a_decimal_is_found_by_exactly_its_value(registry: Registry, model_id: str, scale: str) -> None:
    add_schedule(registry, model_id, Decimal(scale))
    add_schedule(registry, model_id, float(scale), version=2)
    with registry.read() as session:

        def found(value: Decimal) -> list[Decimal]:
            query = select(Schedule.guidance_scale).where(Schedule.guidance_scale == value)
            return list(session.scalars(query))

        assert found(Decimal(scale)) == found(Decimal(f"{scale}00" if "." in scale else scale)) == [Decimal(scale)] * 2
        assert found(Decimal(scale) + Decimal("0.000001")) == []


def test_a_sum_that_floats_get_wrong_is_right(registry: Registry, model_id: str) -> None:
    add_schedule(registry, model_id, Decimal("0.1") + Decimal("0.2"))
    with registry.read() as session:
        assert session.scalar(select(Schedule.id).where(Schedule.guidance_scale == Decimal("0.3")))


def test_more_decimals_than_can_be_kept_are_refused_not_rounded(registry: Registry, model_id: str) -> None:
    with pytest.raises(StatementError, match="six decimal places"):
        add_schedule(registry, model_id, Decimal("0.1234567"))


def test_times_come_back_in_utc_whatever_zone_they_were_given_in(registry: Registry, model_id: str) -> None:
    given = datetime(2026, 7, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    with registry.write() as session:
        session.get_one(Model, model_id).created_at = given
    with registry.read() as session:
        read = session.get_one(Model, model_id).created_at
        assert (read, read.tzinfo) == (given, UTC)
        assert session.scalar(select(Model.id).where(Model.created_at == given)) == model_id
        assert session.scalar(select(Model.id).where(Model.created_at < given)) is None


def test_what_does_not_exist_cannot_be_referred_to(registry: Registry, model_id: str) -> None:
    with pytest.raises(IntegrityError), registry.write() as session:
        session.add(ScheduleAlias(model_id=model_id, name="production", schedule_id="sch_nope"))


def test_a_version_is_given_once(registry: Registry, model_id: str) -> None:
    add_schedule(registry, model_id, Decimal(2))
    with pytest.raises(IntegrityError):
        add_schedule(registry, model_id, Decimal("2.000000"))
    add_schedule(registry, model_id, Decimal("2.000001"))
