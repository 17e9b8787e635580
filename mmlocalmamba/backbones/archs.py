"""Architecture variants (paper Table 1, section 4.3) and their scan directions: data, said once.

``directions`` of a variant is what ``directions=None`` means for a backbone.
"""
# One line per block, found by the paper's search (Fig. 4 and section A.2; released with the authors' code).
_SEARCHED = {
    'localvim': (
        'h v_flip w7 w7_flip',
        'h_flip w2_flip w7 w7_flip',
        'h h_flip v w7',
        'h h_flip v v_flip',
        'h h_flip v v_flip',
        'h h_flip v v_flip',
        'h_flip v v_flip w7',
        'h_flip v v_flip w2_flip',
        'h h_flip v v_flip',
        'h h_flip v v_flip',
        'h v v_flip w2',
        'h v v_flip w2_flip',
        'h h_flip v_flip w7',
        'h_flip v v_flip w2',
        'h h_flip v v_flip',
        'h v w2 w2_flip',
        'v v_flip w2 w7',
        'h h_flip v w2',
        'h h_flip w2_flip w7',
        'v v_flip w2 w2_flip',
    ),
    'localvmamba_tiny': (
        'h h_flip w7 w7_flip',
        'h_flip v_flip w2 w2_flip',
        'h_flip v_flip w2_flip w7',
        'h_flip v v_flip w2',
        'h h_flip v_flip w2_flip',
        'h_flip v_flip w2 w2_flip',
        'h w2_flip w7 w7_flip',
        'h h_flip v v_flip',
        'h v_flip w7 w7_flip',
        'h_flip v w2 w7_flip',
        'v v_flip w2 w7_flip',
        'h h_flip v_flip w2_flip',
        'v_flip w2_flip w7 w7_flip',
        'h_flip v_flip w2_flip w7_flip',
        'h_flip v w7 w7_flip',
    ),
    'localvmamba_small': (
        'h v v_flip w7_flip',
        'h h_flip v w7',
        'h_flip v v_flip w7',
        'h_flip v w2_flip w7',
        'h_flip v w2_flip w7',
        'h_flip v_flip w2 w7_flip',
        'h_flip v v_flip w7',
        'h v v_flip w7',
        'h v v_flip w7',
        'h v v_flip w7_flip',
        'h h_flip v v_flip',
        'h v v_flip w2',
        'v v_flip w2_flip w7',
        'h h_flip v w2',
        'h_flip v v_flip w7_flip',
        'h h_flip v v_flip',
        'h v v_flip w7_flip',
        'h v v_flip w7_flip',
        'h h_flip v_flip w7',
        'h_flip v_flip w2_flip w7',
        'h_flip v v_flip w7_flip',
        'v v_flip w7 w7_flip',
        'h v v_flip w7_flip',
        'h_flip v v_flip w2',
        'h v v_flip w2_flip',
        'h h_flip v w7',
        'h h_flip w7 w7_flip',
        'h v_flip w2 w2_flip',
        'h v_flip w2 w7',
        'h v v_flip w7_flip',
        'h_flip v w2_flip w7',
        'h_flip v_flip w7 w7_flip',
        'h v w7 w7_flip',
    ),
}
SEARCHED = {name: [block.split() for block in blocks] for name, blocks in _SEARCHED.items()}

# The paper's models without search (marked * in its tables), in every block.
WITHOUT_SEARCH = ['h', 'h_flip', 'w2', 'w2_flip']

LOCAL_VIM = {
    # Ours, for demos and tests; the paper has no such size.
    'nano': dict(embed_dims=64, num_layers=6, d_state=4, directions=WITHOUT_SEARCH),
    'tiny': dict(embed_dims=192, num_layers=20, directions=SEARCHED['localvim']),
    'small': dict(embed_dims=384, num_layers=20, directions=SEARCHED['localvim']),
}

# The block of VMamba's version 2 (arXiv 2401.10166, section 4.4), which all sizes of that version share.
_V2 = dict(d_state=1, gate=False, conv_bias=False, mlp_ratio=4., patch_embed='conv', downsample='conv',
           directions=WITHOUT_SEARCH)

LOCAL_VMAMBA = {
    'nano': dict(embed_dims=[32, 64, 128, 256], depths=[1, 1, 2, 1], d_state=4, directions=WITHOUT_SEARCH),
    'tiny': dict(embed_dims=[96, 192, 384, 768], depths=[2, 2, 9, 2], directions=SEARCHED['localvmamba_tiny']),
    'small': dict(embed_dims=[96, 192, 384, 768], depths=[2, 2, 27, 2], directions=SEARCHED['localvmamba_small']),
    # VMamba-B's size; the paper searched no directions for it.
    'base': dict(embed_dims=[128, 256, 512, 1024], depths=[2, 2, 27, 2], directions=WITHOUT_SEARCH),
    # Version 2 of VMamba, with local scans: nobody has searched directions for it. sXlY: expand X, Y blocks in stage 3.
    'nano_v2': dict(_V2, embed_dims=[32, 64, 128, 256], depths=[1, 1, 2, 1], expand=1., mlp_ratio=2.),
    'tiny_v2': dict(embed_dims=[96, 192, 384, 768], depths=[2, 2, 8, 2], expand=1., **_V2),
    'tiny_v2_s2l5': dict(embed_dims=[96, 192, 384, 768], depths=[2, 2, 5, 2], expand=2., **_V2),
    'small_v2': dict(embed_dims=[96, 192, 384, 768], depths=[2, 2, 15, 2], expand=2., **_V2),
    'small_v2_s1l20': dict(embed_dims=[96, 192, 384, 768], depths=[2, 2, 20, 2], expand=1., **_V2),
    'base_v2': dict(embed_dims=[128, 256, 512, 1024], depths=[2, 2, 15, 2], expand=2., **_V2),
    'base_v2_s1l20': dict(embed_dims=[128, 256, 512, 1024], depths=[2, 2, 20, 2], expand=1., **_V2),
}
