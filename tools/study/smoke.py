# The smallest slice that means something: two batch sizes, two methods, one
# rate and one seed each, a third of the images shown. For smoke.sh.
_base_ = './declaration.py'
data = dict(
    root='data/study_smoke/',
    train=dict(images=2048),
    tune=dict(images=200),
    test=dict(images=200),
)
pretraining = dict(images=15000)
training = dict(epochs=8, decay_epochs=(5, 7), warmup_epochs=1)
grid_moves = 0
grid_refinement = ()
methods = dict(sgd=dict(rates=[0.08]), agvm_sgd=dict(rates=[0.08]))
stages = [
    dict(
        name='smoke',
        models=['faster_rcnn'],
        methods=['sgd', 'agvm_sgd'],
        batch_sizes=[32, 128],
        seeds=[0],
    )
]
