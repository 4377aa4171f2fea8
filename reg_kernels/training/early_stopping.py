"""stub"""

import copy


class EarlyStopping:
    def __init__(self, model, patience=3):
        self.m = model
        self.p = patience
        self.best = float("inf")
        self.best_check = 0
        self.checks = 0
        self.wait = 0
        self.stopped = False
        self.w = None

    def __call__(self, v):
        if v < self.best:
            self.best = v
            self.best_check = self.checks
            self.wait = 0
            self.w = copy.deepcopy(self.m.state_dict())
        else:
            self.wait += 1
            self.stopped = self.wait >= self.p
        self.checks += 1
        return self.stopped

    def restore(self):
        if self.w:
            self.m.load_state_dict(self.w)

    def state_dict(self):
        return {
            k: getattr(self, k) for k in ("best", "best_check", "checks", "wait", "stopped", "w")
        }

    def load_state_dict(self, s):
        self.__dict__.update(s)
