from learners.advantages import AdaptiveKL as AdaptiveKL
from learners.advantages import kl_estimate as kl_estimate
