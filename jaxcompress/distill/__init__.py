"""Knowledge distillation: a student network learns from what a teacher network knows.

Every loss here is a pure function on arrays, with one convention. The student's array comes first, the teacher's
second, and no gradient flows into the teacher's. A loss on examples returns one value an example, as in
`optax.losses`, and takes `where=`, the mask of the examples (or tokens) that count; average with `masked_mean`. A
loss on the relations within a batch returns a scalar. Half-precision inputs are computed in float32. Images are NHWC.
Values and gradients are finite on every finite input: zeros, duplicates, a batch of one, logits up to 1e30. Only a
value that float32 cannot hold is infinite, such as the squares that `hint_loss` takes of differences above 1e19.
A label that is no class, and that `where` does not leave out, gives NaN instead of another class's loss.
A loss's `temperature` is given by name. It is 1 by default, which softens nothing, but where a method comes with a
value of its own. `alpha` weighs the soft targets against hard labels (in `decoupled_loss` it is the paper's). A random
`key` comes first.

    losses = distill.distillation_loss(student(x), teacher(x), labels, alpha=0.9, temperature=4.0)
    loss = losses.mean()

What can be learned from a teacher, and where it is: its outputs (`_softmax`, `_logits`, `_topk`), without a teacher
(`_teacher_free`); its features (`_hints`, `_attention_maps`, `_grams`, `_boundaries`, `_factors`, `_review`), after a
learned `Projector` where the shapes differ; relations between examples (`_relations`, `_contrastive`); a transformer's
layers (`_transformers`), a detector's heads (`_detection`), sequences (`_sequences`). How it is taught: several
teachers and peers (`_ensembles`), targets stored beforehand (`_stored_targets`), weights and temperatures by the step
(`_schedules`), chains of students and made-up data (`_regimes`), vocabularies too large for all logits (`_fused`).
"""

from jaxcompress.distill._attention_maps import attention_map, attention_transfer_loss
from jaxcompress.distill._boundaries import activation_boundary_loss, expected_margin, margin_relu_loss
from jaxcompress.distill._contrastive import (
    ContrastMemory,
    contrast_loss,
    contrast_memory,
    contrastive_heads,
    contrastive_loss,
    in_batch_contrastive_loss,
)
from jaxcompress.distill._detection import (
    class_weighted_soft_loss,
    detection_box_loss,
    detection_class_loss,
    teacher_bounded_loss,
)
from jaxcompress.distill._ensembles import ensemble_targets, mutual_learning_loss, several_teachers_loss
from jaxcompress.distill._factors import Paraphraser, factor_transfer_loss, paraphraser, translator
from jaxcompress.distill._fused import fused_distillation_loss
from jaxcompress.distill._grams import flow_loss, flow_matrix, inter_channel_loss, neuron_selectivity_loss
from jaxcompress.distill._hints import hint_loss, variational_information_loss
from jaxcompress.distill._inputs import masked_mean
from jaxcompress.distill._logits import (
    batch_correlation_loss,
    class_correlation_loss,
    decoupled_loss,
    dist_loss,
    jensen_shannon_loss,
    logit_matching_loss,
    multi_level_loss,
    reverse_kl_loss,
    standardized_soft_target_loss,
)
from jaxcompress.distill._projectors import Projector, conv_projector, dense_projector, variational_projector
from jaxcompress.distill._regimes import AlternatingState, alternating, munge, refined_labels, teaching_chain
from jaxcompress.distill._relations import (
    angle_relation_loss,
    consecutive_correlation_loss,
    correlation_congruence_loss,
    correlation_matrix,
    distance_relation_loss,
    probabilistic_transfer_loss,
    relational_loss,
    similarity_preserving_loss,
)
from jaxcompress.distill._review import review_fusion, review_loss
from jaxcompress.distill._safe import adaptive_pool, pool_to_smaller
from jaxcompress.distill._schedules import (
    StageWeights,
    annealed_temperature,
    early_stopped,
    hints_first,
    moving_average,
    warmed_up,
)
from jaxcompress.distill._sequences import (
    Sequences,
    mix_sequences,
    on_policy_loss,
    sample_sequences,
    sequence_level_loss,
)
from jaxcompress.distill._softmax import (
    distillation_loss,
    hard_label_loss,
    soft_cross_entropy_loss,
    soft_label_loss,
    soft_target_loss,
    temperature_log_softmax,
    temperature_softmax,
    weighted_distillation_loss,
)
from jaxcompress.distill._stored_targets import (
    SampledTargets,
    TopKTargets,
    sampled_target_loss,
    sampled_targets,
    top_k_target_loss,
    top_k_targets,
)
from jaxcompress.distill._teacher_free import (
    class_similarity_teacher,
    gradient_rescaling_factor,
    label_smoothing_loss,
    reweighting_teacher,
    smooth_labels,
    teacher_free_loss,
    virtual_teacher,
)
from jaxcompress.distill._topk import top_k_loss
from jaxcompress.distill._transformers import (
    TINYBERT_PHASES,
    LayerOutputs,
    Phase,
    attention_matrix_loss,
    hidden_state_loss,
    intermediate_loss,
    phase_loss,
    uniform_layer_map,
)

__all__ = [
    "TINYBERT_PHASES",
    "AlternatingState",
    "ContrastMemory",
    "LayerOutputs",
    "Paraphraser",
    "Phase",
    "Projector",
    "SampledTargets",
    "Sequences",
    "StageWeights",
    "TopKTargets",
    "activation_boundary_loss",
    "adaptive_pool",
    "alternating",
    "angle_relation_loss",
    "annealed_temperature",
    "attention_map",
    "attention_matrix_loss",
    "attention_transfer_loss",
    "batch_correlation_loss",
    "class_correlation_loss",
    "class_similarity_teacher",
    "class_weighted_soft_loss",
    "consecutive_correlation_loss",
    "contrast_loss",
    "contrast_memory",
    "contrastive_heads",
    "contrastive_loss",
    "conv_projector",
    "correlation_congruence_loss",
    "correlation_matrix",
    "decoupled_loss",
    "dense_projector",
    "detection_box_loss",
    "detection_class_loss",
    "dist_loss",
    "distance_relation_loss",
    "distillation_loss",
    "early_stopped",
    "ensemble_targets",
    "expected_margin",
    "factor_transfer_loss",
    "flow_loss",
    "flow_matrix",
    "fused_distillation_loss",
    "gradient_rescaling_factor",
    "hard_label_loss",
    "hidden_state_loss",
    "hint_loss",
    "hints_first",
    "in_batch_contrastive_loss",
    "inter_channel_loss",
    "intermediate_loss",
    "jensen_shannon_loss",
    "label_smoothing_loss",
    "logit_matching_loss",
    "margin_relu_loss",
    "masked_mean",
    "mix_sequences",
    "moving_average",
    "multi_level_loss",
    "munge",
    "mutual_learning_loss",
    "neuron_selectivity_loss",
    "on_policy_loss",
    "paraphraser",
    "phase_loss",
    "pool_to_smaller",
    "probabilistic_transfer_loss",
    "refined_labels",
    "relational_loss",
    "reverse_kl_loss",
    "review_fusion",
    "review_loss",
    "reweighting_teacher",
    "sample_sequences",
    "sampled_target_loss",
    "sampled_targets",
    "sequence_level_loss",
    "several_teachers_loss",
    "similarity_preserving_loss",
    "smooth_labels",
    "soft_cross_entropy_loss",
    "soft_label_loss",
    "soft_target_loss",
    "standardized_soft_target_loss",
    "teacher_bounded_loss",
    "teacher_free_loss",
    "teaching_chain",
    "temperature_log_softmax",
    "temperature_softmax",
    "top_k_loss",
    "top_k_target_loss",
    "top_k_targets",
    "translator",
    "uniform_layer_map",
    "variational_information_loss",
    "variational_projector",
    "virtual_teacher",
    "warmed_up",
    "weighted_distillation_loss",
]
