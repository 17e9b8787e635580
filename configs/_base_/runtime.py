"""What every task shares. Use it through default_runtime_{cls,det,seg}.py."""
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='mmlocalmamba.CheckpointHook', interval=1, max_keep_ckpts=3),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    numerical_guard=dict(type='mmlocalmamba.NumericalGuardHook'),
    broken_files=dict(type='mmlocalmamba.BrokenFilesHook'),
    # converts the authors' checkpoints, and refuses one that does not fill the backbone
    official_checkpoint=dict(type='mmlocalmamba.OfficialCheckpointHook'),
    checks=dict(type='mmlocalmamba.TrainingChecksHook'))

# Weights the backbone starts from, a path or URL, ours or the authors'; None starts from scratch. Works in every
# configuration that inherits this one and as --cfg-options pretrained=FILE: TrainingChecksHook hands it on.
pretrained = None

custom_hooks = []

# Inferencers load a checkpoint before they build a model: what reads `mmlocalmamba://NAME` must be there by then.
custom_imports = dict(imports=['mmlocalmamba.weights'])

# No weight decay on the state space parameters, norms, biases and embeddings: one rule for the whole model and all
# tasks, heads included. (MMDetection's and MMSegmentation's files of Swin decay the biases of heads.) Every schedule
# adds its optimizer.
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    paramwise_cfg=dict(
        flat_decay_mult=0.0,
        custom_keys={
            'A_log': no_decay,
            '.ssm.D': no_decay,
            'bias': no_decay,
            'norm': no_decay,
            'pos_embed': no_decay,
            'cls_token': no_decay,
            'alphas': no_decay,  # of the direction search
        }))
del no_decay

# cudnn_benchmark: sizes of images vary in detection and segmentation, and each would be timed anew; and which
# algorithm wins may differ from run to run.
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
# Mixed precision by itself is for GPUs: MMEngine's AmpOptimWrapper cannot be built on a CPU, where
# mmlocalmamba.BFloat16OptimWrapper can. Schedules take it from here.
amp_optim_wrapper = ('OptimWrapper' if __import__('mmengine.device').device.get_device() in ('cpu', 'mps') else
                     'AmpOptimWrapper')

vis_backends = [dict(type='LocalVisBackend')]
log_level = 'INFO'
load_from = None
resume = False
