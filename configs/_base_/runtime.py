"""What every task shares. Use it through default_runtime_{cls,det,seg}.py."""
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='mmlocalmamba.CheckpointHook', interval=1, max_keep_ckpts=3),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    numerical_guard=dict(type='mmlocalmamba.NumericalGuardHook'),
    broken_files=dict(type='mmlocalmamba.BrokenFilesHook'))

# Converts the authors' checkpoints, and refuses one that does not fill the backbone.
custom_hooks = [dict(type='mmlocalmamba.OfficialCheckpointHook')]

# No weight decay on the state space parameters, norms, biases and embeddings. Every schedule adds
# its optimizer.
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

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
vis_backends = [dict(type='LocalVisBackend')]
log_level = 'INFO'
load_from = None
resume = False
