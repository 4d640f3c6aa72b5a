from elastic3d.evaluation import evaluate_pair as evaluate_pair
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline as ImageTo3DPipeline
from elastic3d.pipelines.text_to_image import TextToImagePipeline as TextToImagePipeline
from elastic3d.pipelines.training_free import disable as disable
from elastic3d.pipelines.training_free import enable as enable

__version__: str
