"""placeholder"""

from attention_jax.ops.decay_scan import recurrent as _r

attend = _r.attend
unsupported = _r.unsupported
