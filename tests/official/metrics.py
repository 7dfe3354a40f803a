"""Metrics of features by pytorch-fid, torch-fidelity, and the evaluators of guided-diffusion and dgm-eval.

`PYTHONPATH=tests OFFICIAL=<folder with guided-diffusion and dgm-eval in it> python -m official.metrics`

The evaluators import TensorFlow and scikit-learn, of which they need a softmax and distances: those are NumPy's and SciPy's here.
"""

import os
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np

import official

CASES = {"more": (300, 240, 24), "equal": (65, 65, 64), "fewer": (40, 55, 64), "one_fewer": (150, 30, 48), "near": (200, 200, 16)}
"""The numbers of samples of two sets, N and M, and of their dimensions D, of which there may be more."""
NEIGHBOURS = (1, 3, 5)
LOGITS = {"even": (200, 10, 10), "uneven": (157, 12, 10), "one": (64, 5, 1)}
"""The numbers of samples, classes and parts."""


def features(case):
    """Two sets whose dimensions go together, of other means and scales."""
    n, m, d = CASES[case]
    rng = np.random.default_rng([n, m, d])
    x, y = rng.standard_normal((n, d)).cumsum(1), rng.standard_normal((m, d)).cumsum(1)
    apart = 0.02 if case == "near" else 0.3
    return x + 2, (1 + apart) * y + 2 + apart * np.arange(d)[None]


def logits(case):
    n, classes, _ = LOGITS[case]
    return 3 * np.random.default_rng([n, classes]).standard_normal((n, classes))


def distances(x, y):
    from scipy.spatial.distance import cdist

    return cdist(x, y)


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


def _guided_diffusion():
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in ("tensorflow", "tensorflow.compat", "tensorflow.compat.v1")}):
        from evaluations import evaluator

    class Blocks:
        def __init__(self, session):
            pass

        def pairwise_distances(self, x, y):
            return distances(x, y) ** 2

        def less_thans(self, x, radii_x, y, radii_y):
            squares = distances(x, y)[..., None] ** 2
            return np.any(squares <= radii_y, axis=1), np.any(squares <= radii_x[:, None], axis=0)

    evaluator.DistanceBlock = Blocks
    return evaluator


def make():
    import torch
    from pytorch_fid import fid_score
    from scipy import special
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    sys.path[:0] = [str(Path(os.environ["OFFICIAL"]) / name) for name in ("guided-diffusion", "dgm-eval/dgm_eval/metrics")]
    evaluator = _guided_diffusion()
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in ("sklearn", "sklearn.metrics")}):
        import prdc
    prdc.sklearn.metrics.pairwise_distances = lambda x, y, **_: distances(x, y)

    found = {}
    for case in CASES:
        x, y = features(case)
        with warnings.catch_warnings():
            # SciPy's root of a product of lower rank, of which both say that it may be singular.
            warnings.simplefilter("ignore")
            found[f"{case}/fid/pytorch_fid"] = fid_score.calculate_frechet_distance(*moments(x), *moments(y))
            found[f"{case}/fid/guided_diffusion"] = evaluator.FIDStatistics(*moments(x)).frechet_distance(
                evaluator.FIDStatistics(*moments(y))
            )
        torch_x, torch_y = torch.as_tensor(x), torch.as_tensor(y)
        statistics = [metric_fid.fid_features_to_statistics(each) for each in (torch_x, torch_y)]
        found[f"{case}/fid/torch_fidelity"] = metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
        size = min(len(x), len(y))
        kid = {"kid_subsets": 1, "kid_subset_size": size, "kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
        kid |= {"kid_kernel_poly_coef0": 1, "verbose": False, "rng_seed": 0}
        kid = metric_kid.kid_features_to_metric(torch_x[:size], torch_y[:size], **kid)
        found[f"{case}/kid/torch_fidelity"] = kid["kernel_inception_distance_mean"]
        for k in NEIGHBOURS:
            options = {"prc_neighborhood": k, "prc_batch_size": 37, "save_cpu_ram": False, "verbose": False}
            prc = metric_prc.prc_features_to_metric(torch_y, torch_x, **options)
            found[f"{case}/precision_recall/torch_fidelity/{k}"] = [prc["precision"], prc["recall"]]
            estimator = evaluator.ManifoldEstimator(None, row_batch_size=37, col_batch_size=41, nhood_sizes=(k,))
            radii = [estimator.manifold_radii(each) for each in (x, y)]
            found[f"{case}/precision_recall/guided_diffusion/{k}"] = np.concatenate(estimator.evaluate_pr(x, radii[0], y, radii[1]))
            dense = prdc.compute_prdc(x, y, k)
            found[f"{case}/precision_recall/dgm_eval/{k}"] = [dense["precision"], dense["recall"]]
            found[f"{case}/density_coverage/dgm_eval/{k}"] = [dense["density"], dense["coverage"]]
    for case, (n, _, splits) in LOGITS.items():
        given = logits(case)
        score = metric_isc.isc_features_to_metric(torch.as_tensor(given), splits, shuffle=False)
        found[f"{case}/inception_score/torch_fidelity"] = [score["inception_score_mean"], score["inception_score_std"]]
        if n % splits == 0:
            judge = evaluator.Evaluator.__new__(evaluator.Evaluator)
            judge.sess, judge.softmax_batch_size, judge.softmax, judge.softmax_input = mock.MagicMock(), 33, None, "input"
            judge.sess.run = lambda _, feed_dict: special.softmax(feed_dict["input"], axis=1)
            found[f"{case}/inception_score/guided_diffusion"] = [judge.compute_inception_score(given, split_size=n // splits)]
    official.save("metrics", {}, **{name: np.asarray(value) for name, value in found.items()})
    for name, value in found.items():
        print(name, value)


if __name__ == "__main__":
    make()
