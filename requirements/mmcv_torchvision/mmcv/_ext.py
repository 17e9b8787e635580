"""Stand in for mmcv's compiled module: torchvision computes the ops that it has, the others refuse when called.

mmcv.ops loads all its ops from one module, mmcv._ext. mmcv-lite has all of mmcv except for that module. This file fills
the gap. The signatures are those of the compiled module, and so are results and refusals:

- nms, softnms: equal in all bits on a CPU. Boxes are float32, as in the compiled module.
- roi_align with pool_mode='avg': equal in all bits on a CPU, in float16, float32 and float64. One case differs: in
  float64 and without a sampling_ratio, mmcv rounds the number of samples in float32, and torchvision does not.
- deform_conv, modulated_deform_conv: equal up to rounding.

Where both are wrong for some input, both are not equal: mmcv reads tensors that are not contiguous as if they were.
"""
import ctypes

import torch
import torchvision  # noqa: F401  it registers torch.ops.torchvision

STANDS_IN = ('nms', 'softnms', 'roi_align (avg)', 'deform_conv', 'modulated_deform_conv')
REMEDY = 'Install mmcv with its own ops: MMCV=compiled tools/install.sh'


def _float32(number):
    """Round a number as a C++ float argument does."""
    return ctypes.c_float(number).value


# ---- boxes ----

def _check_boxes(boxes, scores):
    for tensor in (boxes, scores):
        if tensor.dtype != torch.float32:
            raise RuntimeError(f'expected scalar type Float but found {tensor.dtype}')


def _areas(boxes, offset):
    return (boxes[:, 2] - boxes[:, 0] + offset) * (boxes[:, 3] - boxes[:, 1] + offset)


def _overlaps(box, area, boxes, areas, offset):
    """Return the IoU of one box with others, in the order of operations of the compiled module.

    torch.where selects as std::max and std::min do where a coordinate is NaN.
    """
    low = torch.where(box[:2] < boxes[:, :2], boxes[:, :2], box[:2])
    high = torch.where(boxes[:, 2:] < box[2:], boxes[:, 2:], box[2:])
    sides = high - low + offset
    sides = torch.where(sides > 0, sides, sides.new_zeros(()))
    inter = sides[:, 0] * sides[:, 1]
    return inter / (area + areas - inter)


def nms(boxes, scores, iou_threshold, offset):
    _check_boxes(boxes, scores)
    if boxes.numel() == 0:
        return torch.empty(0, dtype=torch.long, device=boxes.device)
    threshold = _float32(iou_threshold)
    # The sort is mmcv's, so that equal scores come in the same order. torchvision gets scores that keep this order.
    order = scores.sort(0, descending=True)[1]
    boxes = boxes[order]
    if not offset:
        ranks = torch.arange(len(boxes), 0, -1, dtype=boxes.dtype, device=boxes.device)
        return order[torch.ops.torchvision.nms(boxes, ranks, threshold)]
    # Boxes with the offset added to x2 and y2 would round differently in torchvision.
    device, boxes = boxes.device, boxes.cpu()
    areas = _areas(boxes, offset)
    kept = torch.ones(len(boxes), dtype=torch.bool)
    flags = kept.numpy()  # the same memory; reading a flag of it is quick
    for i in range(len(boxes) - 1):
        if flags[i]:
            kept[i + 1:] &= ~(_overlaps(boxes[i], areas[i], boxes[i + 1:], areas[i + 1:], offset) > threshold)
    return order[kept.to(device)]


def softnms(boxes, scores, dets, iou_threshold, sigma, min_score, method, offset):
    _check_boxes(boxes, scores)
    if boxes.numel() == 0:
        return torch.empty(0, dtype=torch.long)
    threshold, sigma, min_score = map(_float32, (iou_threshold, sigma, min_score))
    areas, scores = _areas(boxes, offset), scores.clone()
    order, left = torch.arange(len(boxes)), len(boxes)  # where each box of the input is now
    i = 0
    while i < left:
        # The first of the best. A NaN at the start is the best, elsewhere it is the worst, as `<` has it.
        if not scores[order[i]].isnan():
            best = i + int(scores[order[i:left]].nan_to_num(nan=-torch.inf).argmax())
            order[[i, best]] = order[[best, i]]
        now, rest = order[i], order[i + 1:left]
        dets[i, :4], dets[i, 4] = boxes[now], scores[now]
        overlaps = _overlaps(boxes[now], areas[now], boxes[rest], areas[rest], offset)
        weights = torch.ones_like(overlaps)
        if method == 2:
            weights = torch.exp(-(overlaps * overlaps) / sigma)
        elif method in (0, 1):
            weights = torch.where(overlaps >= threshold, (1 - overlaps) * method, weights)
        scores[rest] *= weights
        # The last box takes the place of one that falls below the threshold.
        gone, rest, j = (scores[rest] < min_score).tolist(), rest.tolist(), 0
        while j < len(rest):
            if gone[j]:
                rest[j], gone[j] = rest[-1], gone[-1]
                rest.pop(), gone.pop()
            else:
                j += 1
        left = i + 1 + len(rest)
        order[i + 1:left] = torch.tensor(rest, dtype=torch.long)
        i += 1
    return order[:left]


# ---- features of boxes ----

def _check_rois(rois, spatial_scale, pool_mode, aligned):
    if pool_mode != 1:
        _refuse("roi_align with pool_mode='max'")
    if aligned and rois.device.type == 'cpu' and len(rois):  # the CUDA op does not check
        corners = rois[:, 1:] * rois.new_tensor(spatial_scale) - 0.5
        if not (corners[:, 2:] - corners[:, :2] >= 0).all():
            raise RuntimeError('ROIs in ROIAlign cannot have non-negative size!')  # sic, as in mmcv


def roi_align_forward(input, rois, output, argmax_y, argmax_x, aligned_height, aligned_width, spatial_scale,
                      sampling_ratio, pool_mode, aligned):
    spatial_scale = _float32(spatial_scale)
    _check_rois(rois, spatial_scale, pool_mode, aligned)
    output.copy_(torch.ops.torchvision.roi_align(input, rois, spatial_scale, aligned_height, aligned_width,
                                                 sampling_ratio, aligned))


def roi_align_backward(grad_output, rois, argmax_y, argmax_x, grad_input, aligned_height, aligned_width, spatial_scale,
                       sampling_ratio, pool_mode, aligned):
    spatial_scale = _float32(spatial_scale)
    _check_rois(rois, spatial_scale, pool_mode, aligned)
    grad_input += torch.ops.torchvision._roi_align_backward(grad_output, rois, spatial_scale, aligned_height,
                                                            aligned_width, *grad_input.shape, sampling_ratio, aligned)


# ---- deformable convolutions ----

def _inside(offset, shape, kernel, stride, pad, dilation):
    """Return 1 where a sampling point is inside of the image and its border, else 0, in the shape of `offset`.

    At the border itself, where padding and an offset of 0 put it, torchvision's gradient of `offset` is that of one
    side, and mmcv's is 0.
    """
    batch, channels, *out = offset.shape
    points = offset.reshape(batch, -1, *kernel, 2, *out)
    inside = torch.ones_like(points[:, :, :, :, 0], dtype=torch.bool)
    for axis in range(2):
        taps = torch.arange(kernel[axis], device=offset.device) * dilation[axis]
        steps = torch.arange(out[axis], device=offset.device) * stride[axis] - pad[axis]
        taps = taps.view(-1, *[1] * (3 - axis))
        steps = steps.view(-1, *[1] * (1 - axis))
        at = points[:, :, :, :, axis] + (taps + steps)
        inside &= (at > -1) & (at < shape[axis])
    return inside.unsqueeze(4).expand_as(points).reshape(offset.shape)


def _deform_backward(grad, input, weight, offset, mask, bias, stride, pad, dilation, groups, offset_groups, use_mask):
    grad_input, grad_weight, grad_offset, grad_mask, grad_bias = torch.ops.torchvision._deform_conv2d_backward(
        grad, input, weight, offset, mask, bias, *stride, *pad, *dilation, groups, offset_groups, use_mask)
    inside = _inside(offset, input.shape[2:], weight.shape[2:], stride, pad, dilation)
    grad_offset = torch.where(inside, grad_offset, grad_offset.new_zeros(()))
    return grad_input, grad_weight, grad_offset, grad_mask, grad_bias


def _no_mask(input, weight):
    """Return the mask and the bias of a convolution that has neither."""
    return input.new_zeros(len(input), 1), input.new_zeros(len(weight))


def deform_conv_forward(input, weight, offset, output, columns, ones, kW, kH, dW, dH, padW, padH, dilationW, dilationH,
                        group, deformable_group, im2col_step):
    output.copy_(torch.ops.torchvision.deform_conv2d(
        input, weight, offset, *_no_mask(input, weight), dH, dW, padH, padW, dilationH, dilationW, group,
        deformable_group, False))


def deform_conv_backward_input(input, offset, gradOutput, gradInput, gradOffset, weight, columns, kW, kH, dW, dH, padW,
                               padH, dilationW, dilationH, group, deformable_group, im2col_step):
    grad_input, _, grad_offset, _, _ = _deform_backward(
        gradOutput, input, weight, offset, *_no_mask(input, weight), (dH, dW), (padH, padW), (dilationH, dilationW),
        group, deformable_group, False)
    gradInput += grad_input
    gradOffset.copy_(grad_offset)


def deform_conv_backward_parameters(input, offset, gradOutput, gradWeight, columns, ones, kW, kH, dW, dH, padW, padH,
                                    dilationW, dilationH, group, deformable_group, scale, im2col_step):
    _, grad_weight, _, _, _ = _deform_backward(
        gradOutput, input, gradWeight, offset, *_no_mask(input, gradWeight), (dH, dW), (padH, padW),
        (dilationH, dilationW), group, deformable_group, False)  # of the weight it takes only the shape
    gradWeight += scale * grad_weight


def modulated_deform_conv_forward(input, weight, bias, ones, offset, mask, output, columns, kernel_h, kernel_w,
                                  stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group,
                                  with_bias):
    bias = bias if with_bias else input.new_zeros(len(weight))
    output.copy_(torch.ops.torchvision.deform_conv2d(
        input, weight, offset, mask, bias, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group,
        deformable_group, True))


def modulated_deform_conv_backward(input, weight, bias, ones, offset, mask, columns, grad_input, grad_weight, grad_bias,
                                   grad_offset, grad_mask, grad_output, kernel_h, kernel_w, stride_h, stride_w, pad_h,
                                   pad_w, dilation_h, dilation_w, group, deformable_group, with_bias):
    grads = _deform_backward(
        grad_output, input, weight, offset, mask, bias if with_bias else input.new_zeros(len(weight)),
        (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group, True)
    grad_input += grads[0]
    grad_weight += grads[1]
    grad_offset.copy_(grads[2])
    grad_mask.copy_(grads[3])
    if with_bias:
        grad_bias += grads[4]


# ---- the rest ----

def get_compiler_version():
    return 'none: torchvision stands in for the ops of mmcv'


def get_compiling_cuda_version():
    return 'not available'


def _refuse(op):
    raise NotImplementedError(f'{op} is an op of mmcv that torchvision does not have, and nothing is compiled here. '
                              f'{REMEDY}')


def __getattr__(name):
    """Return a function that refuses. mmcv.ops asks for all names when it is imported."""
    if name.startswith('_'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def refuse(*args, **kwargs):
        _refuse(name)

    refuse.__name__ = name
    return refuse
