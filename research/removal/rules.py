"""Rules of guidance for experiments: what a layer does, given the step, the layer and the branches."""

from __future__ import annotations

import torch

from nasa_video.guidance import said_already, within


class Existing:
    """A shipped method, from step `first` on, in some layers."""

    def __init__(self, method, first=0, last=9, layers=range(99)):
        self.method, self.first, self.last, self.layers = method, first, last, set(layers)

    def __call__(self, state, layer, q, positive, negatives):
        s = state.call.step
        if (not state.call.clean and not self.first <= s < self.last) or layer not in self.layers:
            return state.attend(q, positive)
        return self.method(q, positive, negatives, state.attend).z


class Centred:
    """Z+ - scale[step] * layer_scale (Z- - Z0), optionally rising, limited, projected."""

    def __init__(self, scales, conflict=0.0, limit=None, layers=None, project=None, norm=False):
        self.scales, self.conflict, self.limit, self.layers, self.project, self.norm = (
            scales,
            conflict,
            limit,
            layers,
            project,
            norm,
        )

    def scale(self, state, layer):
        s = self.scales[-1] if state.call.clean else self.scales[min(state.call.step, len(self.scales) - 1)]
        return s * (1.0 if self.layers is None else self.layers[layer])

    def own(self, state, layer, q, positive, keys, z_pos, i):
        return state.attend(q, keys) - keys.padding_v

    def __call__(self, state, layer, q, positive, negatives):
        z_pos = state.attend(q, positive)
        scale = self.scale(state, layer)
        if scale == 0:
            return z_pos
        z = z_pos
        for i, (keys, w) in enumerate(negatives):
            own = self.own(state, layer, q, positive, keys, z_pos, i)
            if self.project == "orthogonal":  # what Z+ itself spans is left alone
                p = (z_pos - keys.padding_v).flatten(2)
                o = own.flatten(2)
                o = (
                    o
                    - (o * p).sum(-1, keepdim=True).clamp_min(0) / p.square().sum(-1, keepdim=True).clamp_min(1e-9) * p
                )
                own = o.view_as(own)
            elif self.project == "mean":  # only the part that tokens share
                own = own.mean(1, keepdim=True).expand_as(own)
            elif self.project == "token":
                own = own - own.mean(1, keepdim=True)
            share = torch.ones_like(own[..., :1, :1])
            if self.limit is not None:
                share = within(scale * own, z_pos, limit=self.limit)
            if self.conflict:
                share = share + self.conflict * said_already(z_pos - keys.padding_v, own)
            step = scale * share * own
            z = z - w * step
        if self.norm:  # as long as Z+ in every token
            z = z * (z_pos.flatten(2).norm(dim=-1) / z.flatten(2).norm(dim=-1).clamp_min(1e-9))[..., None, None]
        return z


class Contrast(Centred):
    """The direction is what the model itself adds for the term in THIS prompt: Z(prompt, term) - Z(prompt)."""

    def own(self, state, layer, q, positive, keys, z_pos, i):
        return state.attend(q, state.extra[i].layers[layer]) - z_pos


class Seen(Centred):
    """Centred NASA from the step on where something is to be seen: the first step of a chunk that nothing comes before
    is unguided, since it lays down what the video shows; a single step is guided."""

    def __init__(self, scale, **kw):
        super().__init__([scale], **kw)

    def scale(self, state, layer):
        c = state.call
        if not c.clean and c.chunk == 0 and c.step == 0 and c.num_steps > 1:
            return 0.0
        return super().scale(state, layer)
