"""Settings that every task shares. The schedules inherit this file and add the settings of their task."""
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='mmlocalmamba.CheckpointHook', interval=1, max_keep_ckpts=3),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    numerical_guard=dict(type='mmlocalmamba.NumericalGuardHook'),
    broken_files=dict(type='mmlocalmamba.BrokenFilesHook'),
    # converts the authors' checkpoints and refuses one that does not fill the backbone
    official_checkpoint=dict(type='mmlocalmamba.LoadCheckpointHook'),
    checks=dict(type='mmlocalmamba.TrainingChecksHook'))

custom_hooks = []

# Inferencers load a checkpoint before they build a model, so what loads `mmlocalmamba://NAME` must be imported first.
custom_imports = dict(imports=['mmlocalmamba.openmmlab.models'])

# There is no weight decay on state space parameters, norms, biases and embeddings. The rule is the same for all tasks
# and for the whole model, heads included. (MMDetection's and MMSegmentation's configurations of Swin decay biases of
# heads.) Each schedule adds its optimizer.
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
            'alphas': no_decay,  # the logits of the direction search
        }))
del no_decay

# cudnn_benchmark is off because image sizes vary in detection and segmentation and each new size would be timed again,
# and because the fastest algorithm may differ from run to run.
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
# Schedules in mixed precision take this type. MMEngine's AmpOptimWrapper cannot be built on a CPU. There,
# mmlocalmamba.BFloat16OptimWrapper can (tools/train.py --amp).
amp_optim_wrapper = ('OptimWrapper' if __import__('mmengine.device').device.get_device() in ('cpu', 'mps') else
                     'AmpOptimWrapper')

vis_backends = [dict(type='LocalVisBackend')]
log_level = 'INFO'
load_from = None
resume = False
