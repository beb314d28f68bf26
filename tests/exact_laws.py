"""Every behavior policy beside its law by definition (`reference.policies`): what samplers and scores are held to."""

import math

from reference import policies as laws
from reference.policies import Law

from trb.policies import (
    BehaviorPolicy,
    GeometricPolicy,
    SKDPolicy,
    StudentPolicy,
    TeacherPolicy,
    TemperaturePolicy,
    TrustRegionPolicy,
)

POLICIES: dict[str, tuple[BehaviorPolicy, Law]] = {
    "student": (StudentPolicy(), laws.student()),
    "temperature 0.8": (TemperaturePolicy(0.8), laws.temperature(0.8)),
    "budget 0": (TrustRegionPolicy(0.0), laws.student()),
    "budget 0.02": (TrustRegionPolicy(0.02), laws.trust_region(0.02)),
    "budget 0.5": (TrustRegionPolicy(0.5), laws.trust_region(0.5)),
    "budget inf": (TrustRegionPolicy(math.inf), laws.teacher()),
    "weight 0.3": (GeometricPolicy(0.3), laws.geometric(0.3)),
    "skd": (SKDPolicy(2, 0.6), laws.skd(2, 0.6)),
    "teacher": (TeacherPolicy(), laws.teacher()),
}
