"""The untuned samplers' curves in the registry: one job of a setting measures them for all later ones."""

import hashlib
import json
import logging
from importlib.metadata import version

from sqlalchemy.exc import DBAPIError, IntegrityError

from service.registry.database import is_away
from service.registry.tables import UntunedCurveRow
from service.shared.job_requests import TuningJobRequest
from timetuner_core.evaluation.worth import UntunedCurve
from worker.runtime import Runtime

logger = logging.getLogger(__name__)


def known_curves(runtime: Runtime, request: TuningJobRequest, scales: list[float]) -> dict[float, UntunedCurve]:
    """The curves of a tuning job's setting that were measured before, by the guidance scale."""
    with runtime.registry.read() as session:
        rows = {scale: session.get(UntunedCurveRow, _key(request, scale)) for scale in scales}
        return {scale: UntunedCurve.from_dict(row.curve) for scale, row in rows.items() if row is not None}


def keep_curve(runtime: Runtime, request: TuningJobRequest, scale: float, curve: UntunedCurve) -> None:
    """Store a curve for later jobs, unless another worker has, or the database is away: then they measure it anew."""
    values = curve.to_dict()
    if values is None:
        return
    row = UntunedCurveRow(key=_key(request, scale), model_id=request.model, curve=values)
    try:
        with runtime.registry.write() as session:
            if session.get(UntunedCurveRow, row.key) is None:
                session.add(row)
    except IntegrityError:
        logger.info("another worker has stored the same curve")
    except DBAPIError as error:
        if not is_away(error):
            raise
        logger.warning("the database is away; the untuned sampler's curve is not kept: %s", error.orig)


def _key(request: TuningJobRequest, scale: float) -> str:
    """A digest of all that decides an untuned sampler's distances to its teacher."""
    left_out = {"guidance_scale", "guidance_scale_high"}
    setting = {name: str(value) for name, value in request.key().items() if name not in left_out}
    evaluation = request.evaluation
    # Conditions are drawn for all noises that the evaluation may take.
    noises = [request.seed, evaluation.num_samples, evaluation.most_samples, evaluation.teacher_num_steps]
    # Older versions have measured some in other precisions.
    deciding = [setting, scale, noises, "float32", version("timetuner")]
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
