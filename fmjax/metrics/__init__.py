"""Metrics: distances between two sets of samples, (N, ...) and (M, ...), flattened to vectors.

W_2^2 = min_gamma E |x - y|^2,   (x, y) ~ gamma                                               (1)
SW_2^2 = E W_2^2(v^T x, v^T y),   |v| = 1                                                     (2)
ED^2 = 2 E |x_1 - y_1| - E |x_1 - x_2| - E |y_1 - y_2|                                        (3)
FD = |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))                                        (4)

with gamma the couplings of the two sets, v uniform among directions, x_1 and x_2, y_1 and y_2 independent draws from either set, and
m and C their means and covariances.

Metrics of images compare features of a network. `frechet` compares their `moments`, which are summed batch by batch or read from a file
of reference statistics: it is the FID, the sFID or FD-DINOv2, by the network. `kernel_distance` is the KID; `inception_score`,
`precision_recall` and `density_coverage` are those of their papers.

And how straight a flow is, from states saved on the way, `sampling.sample_ode(..., save=lambda x, t: x)`: their length, their energy and
what of it is more than a straight line's, their turns, and NPE, the energy of the flow against that of optimal transport.
"""

from fmjax.metrics.collecting import collect
from fmjax.metrics.distances import energy_distance, frechet_distance, nearest_distance, sliced_wasserstein, wasserstein
from fmjax.metrics.features import inception_score, kernel_distance
from fmjax.metrics.neighbours import density_coverage, precision_recall
from fmjax.metrics.statistics import Moments, frechet, load_moments, merge, moments, save_moments, update
from fmjax.metrics.trajectories import curvature, normalized_path_energy, path_energy, path_length, straightness

__all__ = [
    "wasserstein",
    "sliced_wasserstein",
    "energy_distance",
    "frechet_distance",
    "nearest_distance",
    "collect",
    "Moments",
    "moments",
    "update",
    "merge",
    "frechet",
    "load_moments",
    "save_moments",
    "kernel_distance",
    "inception_score",
    "precision_recall",
    "density_coverage",
    "path_length",
    "path_energy",
    "straightness",
    "curvature",
    "normalized_path_energy",
]
